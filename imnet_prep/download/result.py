"""How a download ended: where its URLs stand, and whether too many of them failed."""

from collections import Counter
from dataclasses import dataclass

from imnet_prep.download.journal import Totals
from imnet_prep.errors import BudgetError, ImnetError

_JUDGE_AFTER = 1000  # finished URLs before --max-failed may stop a run early


@dataclass(frozen=True, slots=True)
class DownloadResult:
    """How a run ended.

    Attributes:
        totals: Where all URLs of the folder stand.
        seconds: Duration of this run.
        top_hosts: (host, failures) of the hosts with the most failed URLs.
        verdict: The error to raise once the result is shown (interrupted, or too many failures), or None.
    """

    totals: Totals
    seconds: float
    top_hosts: tuple[tuple[str, int], ...]
    verdict: ImnetError | None = None


def is_hopeless(ok: int, finished: int, total: int, allowed_frac: float) -> bool:
    """Return whether so many URLs of an unfinished run failed that it is to be stopped early.

    Args:
        ok: Images so far.
        finished: URLs so far, those with an image included.
        total: URLs of the run.
        allowed_frac: Share of failed URLs above which the run fails, 0-1.
    """
    return allowed_frac < 1 and _JUDGE_AFTER <= finished < total and 1 - ok / finished > allowed_frac


def too_many(totals: Totals, allowed_frac: float, *, stopped: bool = False) -> BudgetError | None:
    """Return the verdict on more failures than allowed, or None.

    Args:
        totals: Where the URLs stand.
        allowed_frac: Share of failed URLs among the finished ones that is allowed, 0-1.
        stopped: Whether the run is stopped for this before its end.
    """
    failed = sum(totals.failed.values())
    share = failed / max(1, totals.ok + failed)
    if share <= allowed_frac:
        return None
    mostly = ", ".join(f"{count} {reason}" for reason, count in Counter(totals.failed).most_common(3))
    return BudgetError(
        f"{'stopped: ' if stopped else ''}{failed} of {totals.ok + failed} URLs failed, mostly {mostly}",
        expected=f"at most {allowed_frac:.0%} (--max-failed)",
        got=f"{share:.1%}",
        remedy="see failures.jsonl" if not stopped else "the rest is pending; raise --max-failed to continue",
    )
