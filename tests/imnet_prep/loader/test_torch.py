"""Batches as tensors of PyTorch: the same bytes, not copied, resumed anywhere. Skipped where torch is not installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep import EvalOptions, TrainOptions
from imnet_prep.errors import PipelineError
from imnet_prep.types import Batch
from tests.imnet_prep.loader.runs import EVERYTHING, OPTIONS, TRAIN, VAL, run_epoch
from tests.records import spoil_image

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader  # noqa: E402

from imnet_prep.loader.torch import TorchLoader  # noqa: E402

ROOT = Path(__file__).parents[3]
STEPS = TRAIN // 8
SEED = 5
Tensors = tuple[Any, ...]


def digest(tensors: Tensors) -> str:
    """Return the digest of a batch of tensors, its images as the loader makes them."""
    images = tensors[0].permute(0, 2, 3, 1)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in (images, *tensors[1:]))).hexdigest()


def expected(batches: Iterable[Batch]) -> list[str]:
    """Return the digests of what the tensors must hold."""
    found = []
    for batch in batches:
        labels = [label.astype(np.int64).tobytes() for label in (batch.label, batch.mix_label) if label is not None]
        share = b"" if batch.mix_weight is None else batch.mix_weight.tobytes()
        found.append(hashlib.sha256(b"".join((batch.image.tobytes(), *labels, share))).hexdigest())
    return found


def opened(
    records: Path, options: TrainOptions | EvalOptions = OPTIONS, split: str = "train", **how: Any
) -> TorchLoader:
    return TorchLoader(records, split, options, how.pop("seed", SEED), **how)


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING, EvalOptions(8, 32)], ids=["crop", "everything", "eval"])
def test_tensors_hold_the_batches(records: Path, options: TrainOptions | EvalOptions) -> None:
    with opened(records, options) as loader:
        for epoch in (0, 1):
            assert [digest(batch) for batch in loader] == expected(run_epoch(records, options, epoch))


def test_images_are_a_view_of_the_memory_that_was_decoded_into(records: Path) -> None:
    made: list[NDArray[np.uint8]] = []

    def allocate(*shape: int) -> NDArray[np.uint8]:
        made.append(np.empty(shape, np.uint8))
        return made[-1]

    with opened(records, allocate=allocate) as loader:
        for number, (images, labels) in enumerate(loader):
            assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.uint8)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.data_ptr() == made[number].ctypes.data
            assert (labels.shape, labels.dtype) == ((8,), torch.int64)
        assert number + 1 == len(loader) == STEPS


def test_a_tensor_that_is_kept_keeps_its_memory_and_gives_it_back(records: Path) -> None:
    with opened(records, workers=2, prefetch=1) as loader:
        kept = [(images[1:3, :, ::2], images.clone()[1:3, :, ::2]) for images, _ in loader]
        assert sum(len(images) for images, _ in loader) == STEPS * 8
        for view, copy in kept:
            assert torch.equal(view, copy)
        addresses = {view.untyped_storage().data_ptr() for view, _ in kept}
        del kept, view, copy
        assert {images.data_ptr() for images, _ in loader} <= addresses


def test_a_dataloader_without_batching_hands_the_same_tensors_on(records: Path) -> None:
    with opened(records) as loader:
        data = DataLoader(loader, batch_size=None)
        assert len(data) == STEPS
        assert [digest(batch) for batch in data] == expected(run_epoch(records))
        assert digest(next(iter(data))) == expected(run_epoch(records, epoch=1))[0]


@pytest.mark.parametrize(("start", "error"), [("fork", RuntimeError), ("spawn", PipelineError)])
@pytest.mark.filterwarnings("ignore:.*fork.*", "ignore:This DataLoader will create")
def test_worker_processes_are_refused_with_a_word_on_what_to_do(
    records: Path, start: str, error: type[Exception]
) -> None:
    with opened(records) as loader:
        data = DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context=start)
        with pytest.raises(error) as raised:
            next(iter(data))
        last = str(raised.value).splitlines()[-1]
        assert re.search(
            r"a TorchLoader decodes .*; expected num_workers=0; got .*; iterate over the loader itself", last
        )
        assert len(last) < 320
        assert len(list(loader)) == STEPS  # it works on here


# --- the position ----------------------------------------------------------------------------------------------------


def stored(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a state as a checkpoint gives it back."""
    torch.save(state, path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    assert found == state
    return found


@pytest.mark.parametrize("taken", [0, 1, STEPS - 1, STEPS, STEPS + 3])
def test_a_state_goes_on_with_the_next_batch(records: Path, tmp_path: Path, taken: int) -> None:
    every = [*expected(run_epoch(records, EVERYTHING)), *expected(run_epoch(records, EVERYTHING, epoch=1))]
    with opened(records, EVERYTHING, workers=1) as loader:
        seen = 0
        while seen < taken:
            for _ in loader:
                seen += 1
                if seen == taken:
                    break
        state = stored(loader.state_dict(), tmp_path / "state.pt")
    with opened(records, EVERYTHING, workers=3) as loader:
        loader.load_state_dict(json.loads(json.dumps(state)))
        assert (loader.epoch * STEPS + loader.step, loader.state_dict()) == (taken, state)
        found = []
        while loader.epoch < 2:
            found += [digest(batch) for batch in loader]
    assert found == every[taken:]


def test_an_epoch_left_early_is_followed_by_the_next(records: Path) -> None:
    with opened(records) as loader:
        next(iter(loader))
        assert (loader.epoch, loader.step) == (0, 1)
        assert [digest(batch) for batch in loader] == expected(run_epoch(records, epoch=1))
        assert (loader.epoch, loader.step) == (2, 0)
        iter(loader)  # takes nothing
        assert digest(next(iter(loader))) == expected(run_epoch(records, epoch=2))[0]


def test_a_state_goes_on_with_other_ranks_of_the_same_batch(records: Path) -> None:
    whole = expected(run_epoch(records, TrainOptions(16, 32)))
    with opened(records, ranks=2, rank=0) as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
    with opened(records, TrainOptions(16, 32)) as loader:
        loader.load_state_dict(state)
        assert [digest(batch) for batch in loader] == whole[3:]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"seed": 6}, "'seed' differs; expected 6; got 5"),
        ({"order": "balanced"}, "'order' differs; expected 'balanced'; got 'global'"),
        ({"options": TrainOptions(4, 32)}, "'batch' differs; expected 4; got 8"),
        ({"split": "val"}, "'split' differs; expected 'val'; got 'train'"),
    ],
)
def test_a_state_of_another_run_is_refused(records: Path, how: dict[str, Any], named: str) -> None:
    with opened(records) as loader, opened(records, **how) as other:
        state = loader.state_dict()
        with pytest.raises(PipelineError, match=named):
            other.load_state_dict(state)


def test_a_state_of_other_records_or_out_of_range_is_refused(records: Path, tmp_path: Path) -> None:
    with opened(records) as loader:
        state = loader.state_dict()
        for wrong, named in (
            ({}, "'records' differs"),
            ({**state, "records": "0"}, "'records' differs"),
            ({**state, "step": STEPS + 1}, f"step is out of range; expected 0 to {STEPS}"),
            ({**state, "epoch": -1}, "epoch is out of range"),
        ):
            with pytest.raises(PipelineError, match=named):
                loader.load_state_dict(wrong)
        assert loader.state_dict() == state


@pytest.mark.parametrize("taken", [0, 7, STEPS])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
def test_torchdatas_stateful_dataloader_keeps_the_position(records: Path, taken: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    every = [*expected(run_epoch(records)), *expected(run_epoch(records, epoch=1))]
    with opened(records) as loader:
        data = stateful(loader, batch_size=None)
        batches = iter(data)
        for number in range(taken):
            assert digest(next(batches)) == every[number]
        if taken == STEPS:
            assert next(batches, None) is None
        state = data.state_dict()
    with opened(records) as loader:
        data = stateful(loader, batch_size=None)
        data.load_state_dict(state)
        found = [digest(batch) for batch in data]
        assert found == every[taken : 2 * STEPS if taken == STEPS else STEPS]
        assert [digest(batch) for batch in data] == expected(run_epoch(records, epoch=loader.epoch - 1))


def test_steps_are_counted_where_every_row_of_a_batch_was_skipped(copy: Path) -> None:
    where: dict[str, Any] = {"split": "val", "options": EvalOptions(4, 32), "on_error": "skip", "max_skipped": 8}
    for row in range(4, 8):
        spoil_image(copy, 0, row, split="val")
    whole = expected(run_epoch(copy, EvalOptions(4, 32), split="val", on_error="skip", max_skipped=8))
    assert len(whole) == -(-VAL // 4) - 1
    with opened(copy, **where) as loader:
        batches = iter(loader)
        assert [digest(next(batches)) for _ in range(2)] == whole[:2]
        assert loader.step == 3
        state = loader.state_dict()
        assert list(state["skipped"]) == [4, 5, 6, 7]
    with opened(copy, **where) as loader:
        loader.load_state_dict(state)
        assert [digest(batch) for batch in loader] == whole[2:]
        assert [row.position for row in loader.batches.skipped] == [4, 5, 6, 7]


KILLED = """
import sys, torch
from pathlib import Path
from tests.imnet_prep.loader.test_torch import EVERYTHING, digest, opened
records, path = map(Path, sys.argv[1:])
with opened(records, EVERYTHING) as loader:
    if path.exists():
        loader.load_state_dict(torch.load(path))
    while loader.epoch < 2:
        for batch in loader:
            print(digest(batch), flush=True)
            sys.stdin.readline()
            torch.save(loader.state_dict(), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_with_the_same_batches(records: Path, tmp_path: Path) -> None:
    every = [*expected(run_epoch(records, EVERYTHING)), *expected(run_epoch(records, EVERYTHING, epoch=1))]
    command = [sys.executable, "-c", KILLED, str(records), str(tmp_path / "state.pt")]
    found: list[str] = []
    for stop in (STEPS + 5, 2 * STEPS):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            while len(found) < stop:
                found.append(child.stdout.readline().strip())
                child.stdin.write("\n")  # it may save its position
                child.stdin.flush()
            child.stdout.readline()  # of a batch whose position is never saved, or the end
            child.kill()
    assert found == every


# --- ranks -----------------------------------------------------------------------------------------------------------

RANK = """
import sys
from pathlib import Path
from torch import distributed
from tests.imnet_prep.loader.test_torch import digest, opened
distributed.init_process_group("gloo")
with opened(Path(sys.argv[1])) as loader:
    digests = [digest(batch) for batch in loader]
Path(sys.argv[2], f"{distributed.get_rank()}.txt").write_text("\\n".join(digests))
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_ranks_of_torchrun_share_the_records(records: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(records), str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shares = [(tmp_path / f"{rank}.txt").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert [one for step in zip(*shares, strict=True) for one in step] == expected(run_epoch(records))[: STEPS // 2 * 2]


def test_ranks_that_torch_does_not_know_of_are_an_error(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match=r"torch\.distributed is not initialised"):
        opened(records)
    with opened(records, rank=1, ranks=2) as loader:
        assert [digest(batch) for batch in loader] == expected(run_epoch(records, rank=1, ranks=2))


# --- pinned memory ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["crop", "mixed"])
def test_images_are_pinned_where_cuda_is(records: Path, options: TrainOptions) -> None:
    with opened(records, options) as loader:
        for images, *_ in loader:
            assert images.is_pinned()


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["crop", "mixed"])
def test_pinned_memory_is_torchs_own(records: Path, options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA: what would be pinned is marked in its place."""
    pinned: set[int] = set()

    def mark(tensor: Any) -> Any:
        pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    empty, held = torch.empty, list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **how: mark(empty(*shape, **how)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: mark(tensor.clone()))
    with opened(records, options) as loader:
        for batch in loader:
            assert batch[0].untyped_storage()._cdata in pinned
            held.append(batch)
    assert [digest(batch) for batch in held] == expected(run_epoch(records, options))


# --- the example and the guide ---------------------------------------------------------------------------------------


def example(records: Path, out: Path) -> subprocess.Popen[str]:
    """Start the example: 36 steps, a checkpoint every 4."""
    command = [sys.executable, ROOT / "examples" / "torch_train.py", records, "--out", out, "--epochs", "2"]
    command += ["--batch-size", "8", "--image-size", "32", "--save-every", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_the_example_ends_in_the_same_weights_when_it_is_killed(records: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with example(records, killed) as child:
        while not (killed / "last.pt").exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
    assert 0 < torch.load(killed / "last.pt")["data"]["step"] < STEPS
    with example(records, whole) as one, example(records, killed) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    expected, found = (torch.load(folder / "last.pt") for folder in (whole, killed))
    assert found["data"] == expected["data"]
    assert (found["data"]["epoch"], found["data"]["step"]) == (2, 0)
    for name, value in expected["net"].items():
        assert torch.equal(value, found["net"][name]), name


def test_the_code_of_the_guide_runs(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "records").symlink_to(records)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "with-pytorch.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "with-pytorch.md", "exec"), names)
    assert len(blocks) == 4
    assert names["images"].shape[0] == 8
