"""The house rules that code can check: direction of imports, what ``--help`` costs, and where facts are found."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"imnet_prep": {"imnet_prep"}, "mbv2": {"mbv2", "imnet_prep"}, "cli": {"cli", "mbv2", "imnet_prep"}}
HEAVY = ("mindspore", "cv2", "torch", "scipy", "dask", "distributed", "matplotlib", "pandas")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ALLOWED or top in ALLOWED[package], f"{path} imports {name}"


def test_nothing_installed_imports_tests_or_benchmarks() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks"}, path


@pytest.mark.parametrize("module", ["imnet_prep.cli.prep", "imnet_prep.cli.mobilenet"])
def test_help_imports_nothing_heavy(module: str) -> None:
    script = (
        f"import sys, json\nfrom {module} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage:" in done.stdout
    loaded = set(json.loads(done.stderr.strip().splitlines()[-1]))
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("module", ["imnet_prep.check.verify", "imnet_prep.build.convert", "imnet_prep.download"])
def test_mindspore_is_not_needed_before_the_pipeline(module: str) -> None:
    script = f"import sys, {module}\nassert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# --- the records folder has one owner --------------------------------------------------------------------------------

RECORDS = "imnet_prep.records"
OPENERS = {  # what opens a shard, an index, a record list, a list of rejections or a manifest
    "Shard", "open_shard", "read_header", "read_index", "read_index_field", "opened_index", "index_from_data",
    "opened_list", "read_lines", "read_rejected", "load_manifest", "load_rows",
}  # fmt: skip
MAY = {  # who may use what of the formats, and why
    "imnet_prep/build/shard_task.py": {"ShardWriter", "read_back"},  # the one writer of shards
    "imnet_prep/build/commit.py": {"write_lines", "rejected_bytes"},  # the one builder of a manifest
    "imnet_prep/build/job.py": {"rejected_bytes"},  # the list of rejections where the budget is exceeded
}
WRITERS = {"ShardWriter", "read_back", "write_index", "write_lines", "rejected_bytes"}


def outside_records() -> Iterator[tuple[str, ast.Module]]:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("imnet_prep/records/"):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def names_from_records(tree: ast.Module) -> set[str]:
    """Names that a module takes from imnet_prep.records, however it imports them."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(RECORDS):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith(RECORDS)], (
                "import names, not modules"
            )
    return found


def calls(tree: ast.Module) -> set[str]:
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {f.id if isinstance(f, ast.Name) else f.attr for f in functions if isinstance(f, ast.Name | ast.Attribute)}


def texts(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_only_records_opens_what_is_in_a_records_folder() -> None:
    wrong = {name: used for name, tree in outside_records() if (used := names_from_records(tree) & OPENERS)}
    assert not wrong


def test_only_the_shard_task_and_the_commit_write_what_is_in_a_records_folder() -> None:
    for name, tree in outside_records():
        assert names_from_records(tree) & WRITERS <= MAY.get(name, set()), name


def test_only_the_commit_makes_a_manifest() -> None:
    makers = {name for name, tree in outside_records() if {"Manifest", "SplitInfo"} & calls(tree)}
    assert makers == {"imnet_prep/build/commit.py"}


def test_only_records_lists_a_records_folder_and_chooses_its_columns() -> None:
    for name, tree in outside_records():
        assert not [text for text in texts(tree) if "*.mindrecord" in text or text.endswith("*.db")], name
        assert not [text for text in texts(tree) if "FROM INDEXES" in text], name
        assert "blob_fields" not in {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}, name


def test_only_one_place_chooses_the_image_column() -> None:
    def chooses(tree: ast.Module) -> bool:
        pairs = (node.elts for node in ast.walk(tree) if isinstance(node, ast.Tuple | ast.List))
        return any({"image", "data"} == {e.value for e in pair if isinstance(e, ast.Constant)} for pair in pairs)

    files = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
    found = [path.name for path in files if chooses(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == ["mindrecord.py"]


def test_a_publishing_rename_is_made_in_one_place() -> None:
    """Shards, notes and plans move inside a work folder; a name that others read is given by publish.py alone."""
    for name, tree in outside_records():
        if name.startswith("imnet_prep/") and not name.startswith("imnet_prep/download/"):
            allowed = {"imnet_prep/files.py", "imnet_prep/build/shard_task.py", "imnet_prep/build/workdir.py"}
            renames = {
                node.func.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr) in {("os", "rename"), ("os", "replace"), ("shutil", "move")}
            }
            assert not renames or name in allowed, name
