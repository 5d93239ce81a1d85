"""The command: its flags, its JSON, its exit codes, its one-line errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imnet_prep.cli.prep import download
from tests.imnet_prep.download.servers import Exchange, Server, images, write_list

KEYS = {"requested", "ok", "failed", "pending", "malformed", "repeated", "bytes", "seconds"}


def _run(*args: object) -> Result:
    return CliRunner().invoke(download, [str(arg) for arg in args])


def test_the_json_object_is_the_contracts_and_adds_up(tmp_path: Path) -> None:
    with Server(lambda x: x.answer(404) if "gone" in x.path else images(x)) as server:
        first = write_list(tmp_path / "first", [server.url("/1"), server.url("/gone"), server.url("/1")])
        second = tmp_path / "second"
        second.write_text(f"n02084071 {server.url('/2')}\nrubbish\n{server.url('/3')}\n")
        args = ["--urls", first, second, "--out", tmp_path / "out", "--wnid", "n00000001", "--allow-private", "--json"]
        done = _run(*args)
        again = _run(*args)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) == KEYS
    assert result["requested"] == 4 == result["ok"] + sum(result["failed"].values()) + result["pending"]
    assert (result["ok"], result["failed"], result["malformed"], result["repeated"]) == (3, {"gone": 1}, 1, 1)
    assert {path.parent.name for path in (tmp_path / "out").glob("n*/*.jpg")} == {"n01440764", "n02084071", "n00000001"}
    assert json.loads(again.stdout) | {"seconds": 0} == result | {"seconds": 0}


def test_without_json_people_get_a_table(tmp_path: Path) -> None:
    with Server(lambda x: x.answer(404)) as server:
        done = _run(
            "--urls", write_list(tmp_path / "list", [server.url("/x")]), "--out", tmp_path / "out", "--allow-private"
        )
    assert done.exit_code == 0
    failures = tmp_path / "out" / "failures.jsonl"
    assert [re.split("  +", line.strip()) for line in done.stdout.splitlines()[:5]] == [
        ["requested", "1"], ["ok", "0, 0 bytes"], ["failed", f"1, listed in {failures}"], ["gone", "1"],
        [f"at 127.0.0.1:{server.port}", "1"],
    ]  # fmt: skip
    assert "pending" not in done.stdout


def test_private_addresses_are_refused_unless_allowed(tmp_path: Path) -> None:
    with Server(images) as server:
        done = _run("--urls", write_list(tmp_path / "list", [server.url("/1")]), "--out", tmp_path / "out", "--json")
        assert server.connections == 0
    assert json.loads(done.stdout)["failed"] == {"address_refused": 1}


@pytest.mark.slow
def test_opt_outs_are_honoured_unless_ignored(tmp_path: Path) -> None:
    def route(exchange: Exchange) -> None:
        exchange.headers.setdefault("x", "")
        from tests.imnet_prep.download.servers import picture

        exchange.answer(200, picture(1), X_Robots_Tag="noimageai")

    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url("/1")])
        kept_out = _run("--urls", lists, "--out", tmp_path / "a", "--allow-private", "--json")
        taken = _run("--urls", lists, "--out", tmp_path / "b", "--allow-private", "--json", "--ignore-opt-out")
    assert json.loads(kept_out.stdout)["failed"] == {"opted_out": 1}
    assert json.loads(taken.stdout)["ok"] == 1


def test_too_many_failures_exit_with_3_after_the_result(tmp_path: Path) -> None:
    with Server(lambda x: x.answer(404)) as server:
        lists = write_list(tmp_path / "list", [server.url("/x")])
        done = _run("--urls", lists, "--out", tmp_path / "out", "--allow-private", "--json", "--max-failed", "95%")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["failed"] == {"gone": 1}
    assert done.stderr.strip().splitlines()[-1].startswith("error: 1 of 1 URLs failed")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--urls", "nowhere", "--out", "out"], "cannot read URL list nowhere"),
        (["--urls", "list", "--out", "list"], "cannot write to list"),
        (["--urls", "list", "--out", "out", "--wnids", "nowhere"], "nowhere"),
        (["--urls", "list", "--out", "out", "--wnid", "../x"], "--wnid"),
        (["--urls", "list", "--out", "out", "--max-failed", "many"], "--max-failed"),
        (["--urls", "list", "--out", "out", "--max-failed", "120%"], "--max-failed"),
        (["--urls", "list", "--out", "out", "--concurrency", "0"], "--concurrency"),
        (["--urls", "list", "--out", "out", "--per-host", "0"], "--per-host"),
        (["--urls", "list", "--out", "out", "--rate-per-host", "-1"], "--rate-per-host"),
        (["--urls", "list", "--out", "out", "--timeout-s", "0"], "--timeout-s"),
        (["--urls", "list", "--out", "out", "--max-bytes", "0"], "--max-bytes"),
        (["--urls", "list", "--out", "out", "--retries", "-1"], "--retries"),
        (["--urls", "list", "--out", "out", "--short-side", "0"], "--short-side"),
        (["--urls", "list", "--out", "out", "--quality", "101"], "--quality"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("n01440764_1 http://127.0.0.1/x\n", encoding="utf-8")
    done = _run(*args)
    assert done.exit_code == 1
    assert done.stdout == ""
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert words in errors[0]


def test_missing_flags_are_a_usage_error() -> None:
    assert _run("--out", "x").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_asked_to_stop_it_finishes_what_is_in_hand_and_exits_130(tmp_path: Path, number: int) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")

    def slow(exchange: Exchange) -> None:
        time.sleep(0.05)
        images(exchange)

    with Server(slow) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(300)])
        command = [
            sys.executable,
            "-m",
            "imnet_prep",
            "download",
            "--urls",
            str(lists),
            "--out",
            str(tmp_path / "out"),
            "--allow-private",
            "--json",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 30
        while sum(server.hits.values()) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        hits = sum(server.hits.values())
    assert process.returncode == 130, stderr
    result = json.loads(stdout)
    assert result["ok"] == hits
    assert result["pending"] == 300 - hits > 0
    assert (tmp_path / "out" / "failures.jsonl").exists()
    assert b"Traceback" not in stderr


def test_help_is_quick_to_load() -> None:
    loaded = "sorted(set(sys.modules) & {'mindspore', 'requests', 'cv2', 'numpy'})"
    code = f"import sys; import imnet_prep.cli.prep; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mindspore" not in done.stdout
    assert "requests" not in done.stdout
    assert "cv2" not in done.stdout
