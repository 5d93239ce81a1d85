"""The parts of a download as tasks on Dask workers: together they are what one machine gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.download import DownloadOptions, DownloadResult, FetchOptions, PoliteOptions, download, read_finished
from imnet_prep.download.urls import host_key, host_of
from imnet_prep.errors import BudgetError, DownloadError, PlanError
from imnet_prep.files import file_digest
from imnet_prep.records.folder import RecordsFolder
from tests.dask_cluster import Cluster
from tests.imnet_prep.download.servers import Exchange, Route, Server, images
from tests.imnet_prep.obstacles import kill
from tests.machines import HUB, MACHINES, inside, network
from tests.needs import needs

ROOT = Path(__file__).parent.parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Dask's own threads and sockets
needs("distributed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers under nannies, as ``dask worker`` starts them: such a worker may have no child processes."""
    with closing(Cluster(tmp_path_factory.mktemp("dask") / "files", [[], []], options=())) as running:
        yield running


def write_lines(path: Path, hosts: Iterable[str], each: int) -> Path:
    """Write a list with so many URLs of each host, every tenth of them gone; seven lines repeat, one is malformed."""
    lines = [
        f"ab{n % 3}_{h}{n:04}\t{host}/{'gone/' if n % 10 == 9 else ''}{h * each + n}.jpg"
        for n in range(each)
        for h, host in enumerate(hosts)
    ]
    lines += [*lines[:7], "ab0_5 nothing"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gone_or_image(exchange: Exchange) -> None:
    if "gone" in exchange.path:
        exchange.answer(404)
    else:
        images(exchange)


def slowly(exchange: Exchange) -> None:
    time.sleep(0.05)
    gone_or_image(exchange)


@contextmanager
def hosts(count: int, route: Route = gone_or_image) -> Iterator[list[Server]]:
    """Start servers of which each of two parts has half."""
    with ExitStack() as stack:
        of_part: tuple[list[Server], list[Server]] = ([], [])
        while min(map(len, of_part)) < count // 2:
            server = stack.enter_context(Server(route))
            of_part[host_key(host_of(server.url("/"))) % 2].append(server)
        yield [server for of in of_part for server in of[: count // 2]]


def get(path: Path, out: Path, cluster: Cluster | None = None, **more: Any) -> DownloadResult:
    if cluster is not None:
        more |= {"executor": "dask", "scheduler": cluster.address}
    fetch, polite = FetchOptions(allow_private=True), PoliteOptions(per_host=3, retries=1)
    return download(DownloadOptions((path,), out, fetch=fetch, polite=polite, **more))


def images_of(folders: Iterable[Path]) -> Counter[tuple[str, str]]:
    """Return (path, SHA-256) of each image, both of the journal and of the file."""
    found: Counter[tuple[str, str]] = Counter()
    for folder in folders:
        for image in read_finished(folder):
            assert file_digest(folder / image.path) == image.sha256
            found[image.path, image.sha256] += 1
    return found


def test_parts_on_dask_workers_are_together_what_one_machine_gets(tmp_path: Path, cluster: Cluster) -> None:
    seen: list[tuple[int, int | None, str]] = []
    with hosts(6) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 20)
        whole = get(lines, tmp_path / "whole")
        for server in servers:
            server.hits.clear()
            server.open_most = server.open_now
        options = DownloadOptions(
            (lines,), tmp_path / "out", executor="dask", scheduler=cluster.address,
            fetch=FetchOptions(allow_private=True), polite=PoliteOptions(per_host=3, retries=1),
        )  # fmt: skip
        result = download(options, lambda one: seen.append((one.done, one.total, one.unit)))
        assert max(server.open_most for server in servers) <= 3
        assert max(sum(server.hits.values()) for server in servers) == 20
        again = get(lines, tmp_path / "out", cluster)
        assert max(sum(server.hits.values()) for server in servers) == 20
    assert whole.totals.failed == {"gone": 12}
    assert result.totals == again.totals == whole.totals
    assert [failed for _, failed in result.top_hosts] == [failed for _, failed in whole.top_hosts]
    assert result.verdict is None
    parts = sorted(path for path in (tmp_path / "out").iterdir())
    assert [path.name for path in parts] == ["part-1-of-2", "part-2-of-2"]
    assert images_of(parts) == images_of([tmp_path / "whole"])
    places = [{image.url.split("/")[2] for image in read_finished(part)} for part in parts]
    assert min(map(len, places)) > 0
    assert not places[0] & places[1]
    assert seen


def test_the_commands_of_the_page_run(tmp_path: Path, cluster: Cluster) -> None:
    page = (ROOT / "docs" / "download.md").read_text(encoding="utf-8")
    commands = r"(imnet-prep download [^`\n]*--executor dask .*)|`(imnet-prep to-mindrecord parts/[^`]*)`"
    fetch, convert = re.findall(commands, page)
    words = f"{fetch[0].replace('tcp://<address>:8786', cluster.address)} --allow-private && {convert[1]}"
    with hosts(4) as servers:
        write_lines(tmp_path / "urls.txt", [server.url("") for server in servers], 10)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(words, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    found = [line.url for line in RecordsFolder.open(tmp_path / "records").lines("train")]
    parts = [tmp_path / "parts" / f"part-{number}-of-2" for number in (1, 2)]
    assert sorted(map(str, found)) == sorted(image.url for part in parts for image in read_finished(part))
    assert len(found) == 36


@pytest.mark.long
def test_failures_are_judged_over_all_parts(tmp_path: Path, cluster: Cluster) -> None:
    """The hosts of one part serve, those of the other do not: half of all URLs fail, and all of one part's."""
    with hosts(8) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 10)
        get(lines, tmp_path / "probe", part=(1, 2))
        first = {image.url.split("/")[2] for image in read_finished(tmp_path / "probe")}
        for server in servers:
            if f"127.0.0.1:{server.port}" not in first:
                server.route = lambda exchange: exchange.answer(404)
        out = tmp_path / "out"
        totals = get(lines, out, cluster).totals
        share = sum(totals.failed.values()) / totals.requested
        assert 0.1 < share < 1
        assert get(lines, out, cluster, max_failed_frac=share + 0.01).verdict is None
        verdict = get(lines, out, cluster, max_failed_frac=share - 0.01).verdict
    assert isinstance(verdict, BudgetError)
    assert f"{sum(totals.failed.values())} of {totals.requested} URLs failed, mostly" in str(verdict)


@pytest.mark.long
def test_parts_that_go_nowhere_are_stopped_early(tmp_path: Path, cluster: Cluster) -> None:
    def gone(exchange: Exchange) -> None:
        time.sleep(0.03)
        exchange.answer(404)

    with hosts(6, gone) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 700)
        result = get(lines, tmp_path / "out", cluster, max_failed_frac=0.9)
    assert isinstance(result.verdict, BudgetError)
    assert "stopped" in str(result.verdict)
    assert result.totals.failed["gone"] >= 1000
    assert result.totals.pending > 0
    assert result.totals.requested == 4200 == result.totals.failed["gone"] + result.totals.pending


def test_what_cannot_be_divided_is_one_line(tmp_path: Path, cluster: Cluster) -> None:
    missing = tmp_path / "none"
    with pytest.raises(DownloadError, match=r"part 1/2: cannot read URL list .*none"):
        get(missing, tmp_path / "out", cluster)
    with pytest.raises(PlanError, match="go together"):
        DownloadOptions((missing,), tmp_path / "out", executor="dask")
    with pytest.raises(DownloadError, match="standard input"):
        get(Path("-"), tmp_path / "out", cluster)
    with pytest.raises(DownloadError, match="exclude each other"):
        get(missing, tmp_path / "out", cluster, part=(1, 2))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "journal.sqlite").touch()
    with pytest.raises(DownloadError, match="one machine"):
        get(missing, tmp_path / "one", cluster)
    for name in ("part-1-of-2", "part-1-of-3"):
        (tmp_path / "several" / name).mkdir(parents=True)
    with pytest.raises(DownloadError, match="of 2 and 3"):
        get(missing, tmp_path / "several", cluster)


@pytest.mark.long
def test_parts_that_were_begun_stay_as_they_are_with_other_workers(tmp_path: Path, cluster: Cluster) -> None:
    with hosts(4) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 6)
        get(lines, tmp_path / "out" / "part-2-of-3", part=(2, 3))
        asked = sum(sum(server.hits.values()) for server in servers)
        result = get(lines, tmp_path / "out", cluster)
        assert asked < 24 == sum(sum(server.hits.values()) for server in servers)
    assert (result.totals.requested, result.totals.pending) == (24, 0)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["part-1-of-3", "part-2-of-3", "part-3-of-3"]


def command(lines: Path, out: Path, scheduler: str | None) -> list[str]:
    place = ["--urls", str(lines), "--out", str(out), "--allow-private", "--per-host", "3", "--json"]
    dask = ["--executor", "dask", "--scheduler", scheduler] if scheduler else []
    return [sys.executable, "-m", "imnet_prep", "download", *place, *dask]


def test_ctrl_c_stops_all_parts_and_the_same_command_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    with hosts(6, slowly) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 100)
        words = command(lines, tmp_path / "out", cluster.address)
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            while sum(sum(server.hits.values()) for server in servers) < 30:
                assert client.poll() is None
                time.sleep(0.02)
            client.send_signal(signal.SIGINT)
            said, complained = client.communicate(timeout=200)
        assert client.returncode == 130, complained.decode()
        found = json.loads(said)
        assert found["pending"] > 0
        asked = sum(sum(server.hits.values()) for server in servers)
        assert asked == found["ok"] + sum(found["failed"].values())  # what was in flight was finished
        done = subprocess.run(words, capture_output=True, check=True)
        found = json.loads(done.stdout)
        assert (found["requested"], found["pending"], found["failed"]) == (600, 0, {"gone": 60})
        assert max(max(server.hits.values()) for server in servers) == 1


def test_the_part_of_a_killed_worker_is_taken_up_by_another(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path / "dask", [[], []])) as two, hosts(6, slowly) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 30)

        def hit() -> int:
            return sum(sum(server.hits.values()) for server in servers)

        def kill_one() -> None:
            while hit() < 30:
                time.sleep(0.02)
            kill(two.workers[0].pid)

        thread = threading.Thread(target=kill_one)
        thread.start()
        result = get(lines, tmp_path / "out", two)
        thread.join()
        assert two.workers[0].wait() != 0
        assert two.workers[1].poll() is None
        assert max(server.open_most for server in servers) <= 3
        assert 180 <= hit() <= 180 + 3 * len(servers)  # only what was in flight is asked again
    assert (result.totals.ok, result.totals.pending, result.totals.failed) == (162, 0, {"gone": 18})
    parts = list((tmp_path / "out").iterdir())
    assert len(parts) == 2
    assert images_of(parts).total() == 162
    assert not [path for part in parts for path in (part / ".incoming").iterdir()]


@pytest.mark.long
def test_a_killed_process_of_a_part_is_one_line_that_names_it(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path / "dask", [[], []])) as two, hosts(6, slowly) as servers:
        lines = write_lines(tmp_path / "list", [server.url("") for server in servers], 60)

        def kill_one() -> None:
            while sum(sum(server.hits.values()) for server in servers) < 60:
                time.sleep(0.02)
            words = ["pgrep", "-P", str(two.workers[0].pid), "-f", "part_process"]
            kill(int(subprocess.run(words, check=True, capture_output=True).stdout))

        thread = threading.Thread(target=kill_one)
        thread.start()
        with pytest.raises(DownloadError, match=r"part [12]/2: its process ended early; got exit code -9"):
            get(lines, tmp_path / "out", two)
        thread.join()
        assert sum(sum(server.hits.values()) for server in servers) < 360  # the other part was stopped
        assert get(lines, tmp_path / "out", two).totals.ok == 324


# --- four machines ----------------------------------------------------------------------------------------------------

HOSTS = [f"10.0.0.{number}" for number in range(101, 141)]


@contextmanager
def many_hosts(around: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Serve on all of ``HOSTS``. The value is the process, and the beginning of each host's URLs."""
    words = [*around, sys.executable, "-m", "tests.imnet_prep.download.hosts", *HOSTS]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ports = json.loads(server.stdout.readline())
        try:
            yield server, [f"http://{address}:{ports[address]}" for address in HOSTS]
        finally:
            server.kill()


def seen_by(server: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    return dict(json.loads(server.stdout.readline()))


@pytest.mark.long
def test_four_machines_ask_forty_hosts_as_one_would(tmp_path: Path) -> None:
    with (
        network(HOSTS) as (name, others),
        many_hosts(hub := inside(name)) as (server, urls),
        closing(Cluster(tmp_path / "dask", [inside(one) for one in others], around=hub, host=HUB, options=())) as four,
    ):
        lines = write_lines(tmp_path / "list", urls, 30)
        done = subprocess.run([*hub, *command(lines, tmp_path / "out", four.address)], capture_output=True, check=True)
        seen = seen_by(server)
        whole = subprocess.run([*hub, *command(lines, tmp_path / "whole", None)], capture_output=True, check=True)
    assert list(seen) == HOSTS
    assert max(host["open_most"] for host in seen.values()) == 3
    assert {len(host["peers"]) for host in seen.values()} == {1}
    assert {peer for host in seen.values() for peer in host["peers"]} == set(MACHINES)
    assert {sum(host["hits"].values()) for host in seen.values()} == {30}
    found, expected = (json.loads(one.stdout) for one in (done, whole))
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    assert (found["ok"], found["failed"], found["malformed"], found["repeated"]) == (1080, {"gone": 120}, 1, 7)
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == [f"part-{number}-of-4" for number in range(1, 5)]
    assert images_of(parts) == images_of([tmp_path / "whole"])
