"""Every error a user can meet.

::

    ImnetError                 exit 1
    ├── SourceError            an input is not what it should be
    ├── RemoteError            a URL cannot be read, or changed while it was read
    ├── RecordsError           a records folder or its manifest is not usable
    ├── PlanError              a plan that cannot be carried out, or is not the one begun
    ├── DownloadError          a list or a download folder is not usable
    ├── PipelineError          a record cannot be read, decoded or batched
    ├── TrainError             a training run cannot start or continue
    │   ├── RecipeError        an unknown recipe, field or value
    │   └── CheckpointError    a checkpoint that is foreign, damaged or of another shape
    ├── IntegrityError         exit 3: files differ from their manifest
    ├── BudgetError            exit 3: more rejected or failed than the user allows
    └── Interrupted            exit 130: stopped by a signal after a clean checkpoint
"""


class ImnetError(Exception):
    """A named error that becomes one line and an exit code.

    Args:
        what: What went wrong, with the path or name concerned.
        expected: What would have been right.
        got: What was found instead.
        remedy: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", got: str = "", remedy: str = "") -> None:
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        parts = [what, f"expected {expected}" if expected else "", f"got {got}" if got else "", remedy]
        super().__init__("; ".join(" ".join(part.split()) for part in parts if part))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process boundaries here.
        return (_rebuild, (type(self), self.what, self.expected, self.got, self.remedy))


def _rebuild(kind: type[ImnetError], what: str, expected: str, got: str, remedy: str) -> ImnetError:
    return kind(what, expected=expected, got=got, remedy=remedy)


class SourceError(ImnetError):
    """An input is not what it should be."""


class RemoteError(ImnetError):
    """A URL cannot be read, or changed while it was read."""


class RecordsError(ImnetError):
    """A records folder or its manifest is not usable."""


class PlanError(ImnetError):
    """A plan that cannot be carried out, or that differs from the one already begun."""


class DownloadError(ImnetError):
    """A URL list or a download folder is not usable."""


class PipelineError(ImnetError):
    """A record cannot be read, decoded or batched."""


class TrainError(ImnetError):
    """A training run cannot start or continue."""


class RecipeError(TrainError):
    """An unknown recipe, field or value."""


class CheckpointError(TrainError):
    """A checkpoint that is foreign, damaged or of another shape."""


class IntegrityError(ImnetError):
    """Files differ from their manifest."""

    exit_code = 3


class BudgetError(ImnetError):
    """More images rejected, or more URLs failed, than the user allows."""

    exit_code = 3


class Interrupted(ImnetError):
    """Stopped by a signal, after a clean checkpoint."""

    exit_code = 130
