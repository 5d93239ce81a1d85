"""Fine-tuning on classes of very different sizes: what balanced sampling is for."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.build import options as build
from imnet_prep.build.convert import convert
from mbv2.recipe import load_recipe, override
from mbv2.scoring.evaluate import evaluate_checkpoint
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from mbv2.weights.pretrained import pretrained_fields

RATIO = 20  # images of the largest class to those of the smallest
IMAGES = 1000
SEEDS = (0, 1, 2)


def class_sizes(classes: int) -> list[int]:
    """Return how many images each class keeps: a geometric series from ``RATIO`` to 1, of about ``IMAGES`` in all."""
    shares = RATIO ** -(np.arange(classes) / (classes - 1))
    return np.rint(IMAGES * shares / shares.sum()).astype(int).tolist()


@pytest.fixture(scope="module")
def imbalanced(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of ten classes of Tiny-ImageNet: the training split thinned out, 50 validation images of each class."""
    folder = tmp_path_factory.mktemp("imbalanced")
    with tarfile.open(shared_data / "tiny-imagenet-10.tar") as archive:
        names = sorted(member.name for member in archive if "/train/" in member.name and member.isfile())
        classes = sorted({name.split("/")[2] for name in names})
        kept = set()
        for wnid, size in zip(classes, class_sizes(len(classes)), strict=True):
            kept.update([name for name in names if name.split("/")[2] == wnid][:size])
        members = [member for member in archive if "/train/" not in member.name or member.name in kept]
        archive.extractall(folder, members, filter="data")
    out = folder / "records"
    plan, options = build.PlanOptions(), build.ConvertOptions()
    convert([folder / "tiny-imagenet-10"], out, None, plan, options, lambda _: None, lambda: False)
    return out


@pytest.mark.long
@pytest.mark.real_data
@pytest.mark.timeout(1800)
def test_balanced_sampling_finds_more_of_the_small_classes(
    imbalanced: Path, timm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean recall of plain sampling is beaten by more than the spread of three seeds."""
    changes = {"freeze": "backbone", "image_size": 96, "lr": 0.001, **pretrained_fields(timm)}
    base = override(load_recipe("finetune"), changes)
    found: dict[str, list[float]] = {}
    for name in ("plain", "balanced"):
        recalls = found[name] = []
        for seed in SEEDS:
            out = tmp_path / f"{name}-{seed}"
            recipe = override(base, {"sampling": name})
            train(RunOptions(imbalanced, out, recipe, seed, pretrained=timm, features=tmp_path / "features"))
            scores, _ = evaluate_checkpoint(imbalanced, out / "last.ckpt")
            recalls.append(float((scores.confusion.diagonal() / scores.confusion.sum(axis=1)).mean()))
        with capsys.disabled():
            spread = max(recalls) - min(recalls)
            print(
                f"\n{name} sampling: mean recall {np.mean(recalls):.4f}, of three seeds {recalls}, spread {spread:.4f}"
            )
    plain, balanced = found["plain"], found["balanced"]
    assert min(balanced) - max(plain) > 0
    assert np.mean(balanced) - np.mean(plain) > max(max(one) - min(one) for one in (plain, balanced))
