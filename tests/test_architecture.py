"""Rules of the architecture that a test can check: who imports whom, what ``--help`` costs, who opens records."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("imnet_prep", "mbv2", "cli")
LADDER = (  # each imports only from its own line and from those above it
    ("types", "errors", "catalog"),
    ("files", "cpu", "process_pool", "cluster", "remote"),
    ("images",),
    ("records",),
    ("download",),
    ("sources",),
    ("build",),
    ("check",),
    ("loader",),
    ("show",),
    ("imnet_prep",),  # its __init__.py, which offers the loader
    ("mbv2",),
    ("cli",),
)
STEP = {room: step for step, rooms in enumerate(LADDER) for room in rooms}
MAX_LINES = 400
OF_A_SYSTEM = {"fcntl", "grp", "mmap", "msvcrt", "multiprocessing", "platform", "pwd", "resource", "termios", "winreg"}
KNOW_THE_SYSTEM = {"imnet_prep.files", "imnet_prep.cpu", "imnet_prep.process_pool"}
EVERYWHERE = {  # what every system has of os, signal and the modules above
    *(
        f"os.{name}"
        for name in ("DirEntry", "PathLike", "R_OK", "W_OK", "X_OK", "_exit", "access", "cpu_count", "devnull")
    ),
    *(f"os.{name}" for name in ("environ", "fsdecode", "fsencode", "fspath", "fsync", "getcwd", "getpid", "listdir")),
    *(f"os.{name}" for name in ("path", "scandir", "stat", "supports_effective_ids", "walk")),
    *("signal.signal", "signal.SIG_IGN", "platform.machine", "platform.python_version"),
    *("multiprocessing.connection.Connection", "multiprocessing.connection.wait"),
}
ELSEWHERE = {  # and who may use what more, and why
    # Descriptor 2, to which C libraries write; these are the same on every system.
    "imnet_prep.images.stderr": {f"os.{name}" for name in ("dup", "dup2", "open", "close", "write", "O_WRONLY")},
    "imnet_prep.images.native": {"os.RTLD_DEEPBIND"},  # where there is none, two copies of libjpeg never mix
}
HEAVY = ("mindspore", "cv2", "torch", "scipy", "dask", "distributed", "matplotlib", "pandas")


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Parse a file, once for all tests, and return its nodes."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module", autouse=True)
def nodes_are_forgotten() -> Iterator[None]:
    """Two million objects would slow every garbage collection of the tests that follow."""
    yield
    nodes_of.cache_clear()


def dotted(node: ast.expr) -> str:
    """Return ``name`` or ``name.attribute``, and nothing for other expressions."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every installed module; the folder cli is imnet_prep.cli."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join((*(["imnet_prep"] if package == "cli" else []), *parts)).removesuffix(".__init__"), path


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, also inside functions and relative to itself."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join(filter(None, (*package.split(".")[: -node.level + 1 or None], source)))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """Return the room that a dotted name lies in, or None for other packages."""
    package, _, rest = name.partition(".")
    first = rest.split(".")[0]
    if package == "imnet_prep":
        return first if first in STEP else package
    return package if package == "mbv2" else None


def test_every_room_imports_only_from_those_before_it() -> None:
    seen = set()
    for name, path in modules():
        here = room(name) or pytest.fail(name)
        assert here != "imnet_prep" or name in {"imnet_prep", "imnet_prep.__main__"}, (
            f"{name} has no place in the ladder"
        )
        seen.add(here)
        for other in () if path.name == "__main__.py" else imported(name, path):
            there = room(other)
            assert there is None or STEP[there] <= STEP[here], f"{name} imports {other}"
    assert seen == set(STEP)


MBV2_LADDER = (  # inside mbv2, by file where a room has files of several lines; the longest name that fits decides
    ("recipe", "official_config", "runtime", "outputs", "training.ranks", "training.logs", "training.events"),
    ("kernels",),
    ("network",),
    ("data",),
    ("weights",),
    ("scoring",),
    ("show.curves",),
    ("training",),
    ("show", "weights.export", "bench"),
)


def mbv2_step(name: str) -> int:
    """Return the line of MBV2_LADDER that a module of mbv2, or a name in it, belongs to."""
    inside = name.removeprefix("mbv2.")
    fits = [
        (len(entry), step)
        for step, line in enumerate(MBV2_LADDER)
        for entry in line
        if f"{inside}.".startswith(f"{entry}.")
    ]
    return max(fits)[1]


def test_the_files_of_mbv2_import_only_from_those_before_them_and_in_no_circle() -> None:
    files = {name: path for name, path in modules() if name.startswith("mbv2.") and path.name[:2] != "__"}
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        others = {other for other in imported(name, path) if other.startswith("mbv2.")}
        assert not {other for other in others if mbv2_step(other) > mbv2_step(name)}, name
        needs[name] = {file for file in files for other in others if f"{other}.".startswith(f"{file}.")} - {name}
    while needs:  # take away what needs nothing more; a circle stays
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


def test_nobody_imports_the_commands() -> None:
    """Under the name ``cli`` they would be loaded a second time; only tests and ``python -m`` import them at all."""
    for name, path in modules():
        if room(name) != "cli" and path.name != "__main__.py":
            assert not [other for other in imported(name, path) if room(other) == "cli"], name
    word = re.compile(r"(?<![\w.])(cli|manifests)\b")  # most files need not be parsed
    for folder in (*PACKAGES, "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found = imported(folder, path) if word.search(path.read_text(encoding="utf-8")) else ()
            assert not [name for name in found if name.split(".")[0] in {"cli", "manifests"}], path


def test_nothing_installed_imports_tests_or_benchmarks() -> None:
    for name, path in modules():
        assert not {other.split(".")[0] for other in imported(name, path)} & {"tests", "benchmarks"}, path


def named(path: Path) -> Iterator[str]:
    """Yield what a module reads of others by a dotted name, or by getattr and hasattr."""
    for node in nodes_of(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield dotted(node)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr"):
            yield f"{ast.unparse(node.args[0])}.{ast.unparse(node.args[1])}".replace("'", "")


def test_three_modules_alone_know_the_operating_system() -> None:
    for name, path in modules():
        if name not in KNOW_THE_SYSTEM:
            used = {*imported(name, path), *named(path)}
            systems = {one for one in used if one.split(".")[0] in OF_A_SYSTEM or one.startswith(("os.", "signal."))}
            assert systems <= EVERYWHERE | ELSEWHERE.get(name, set()) | {"platform"}, name
            assert "sys.platform" not in used, name


def test_no_module_is_long() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8").count("\n") for _, path in modules()}
    assert not {name for name, count in lines.items() if count > MAX_LINES}


def test_mbv2_has_no_long_file_function_or_class() -> None:
    for path in sorted((ROOT / "mbv2").rglob("*.py")):
        assert path.read_text(encoding="utf-8").count("\n") <= 350, path
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Recipe":  # a list of fields
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= (150 if isinstance(node, ast.ClassDef) else 60), (path.name, node.name, lines)


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
    "Shard", "open_shard", "read_header", "read_index", "index_from_data",
    "opened_list", "read_lines", "read_rejected", "load_manifest", "load_rows",
}  # fmt: skip
MAY = {  # who may use what of the formats, and why
    "imnet_prep/build/shard_task.py": {"ShardWriter", "read_back"},  # the one writer of shards
    "imnet_prep/build/commit.py": {"write_lines", "rejected_bytes"},  # the one builder of a manifest
    "imnet_prep/build/job.py": {"rejected_bytes"},  # the list of rejections where the budget is exceeded
}
WRITERS = {"ShardWriter", "read_back", "write_index", "write_lines", "rejected_bytes"}


def outside_records() -> Iterator[tuple[str, tuple[ast.AST, ...]]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("imnet_prep/records/"):
                yield name, nodes_of(path)


def names_from_records(nodes: tuple[ast.AST, ...]) -> set[str]:
    """Names that a module takes from imnet_prep.records, however it imports them."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(RECORDS):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith(RECORDS)], (
                "import names, not modules"
            )
    return found


def calls(nodes: tuple[ast.AST, ...]) -> set[str]:
    functions = (node.func for node in nodes if isinstance(node, ast.Call))
    return {f.id if isinstance(f, ast.Name) else f.attr for f in functions if isinstance(f, ast.Name | ast.Attribute)}


def texts(nodes: tuple[ast.AST, ...]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_only_records_opens_what_is_in_a_records_folder() -> None:
    wrong = {name: used for name, nodes in outside_records() if (used := names_from_records(nodes) & OPENERS)}
    assert not wrong


def test_only_the_shard_task_and_the_commit_write_what_is_in_a_records_folder() -> None:
    for name, nodes in outside_records():
        assert names_from_records(nodes) & WRITERS <= MAY.get(name, set()), name


def test_only_the_commit_makes_a_manifest() -> None:
    makers = {name for name, nodes in outside_records() if {"Manifest", "SplitInfo"} & calls(nodes)}
    assert makers == {"imnet_prep/build/commit.py"}


def test_only_records_lists_a_records_folder_and_chooses_its_columns() -> None:
    for name, nodes in outside_records():
        assert not [text for text in texts(nodes) if "*.mindrecord" in text or text.endswith("*.db")], name
        assert not [text for text in texts(nodes) if "FROM INDEXES" in text], name
        assert "blob_fields" not in {n.attr for n in nodes if isinstance(n, ast.Attribute)}, name


def test_only_one_place_chooses_the_image_column() -> None:
    def chooses(nodes: tuple[ast.AST, ...]) -> bool:
        pairs = (node.elts for node in nodes if isinstance(node, ast.Tuple | ast.List))
        return any({"image", "data"} == {e.value for e in pair if isinstance(e, ast.Constant)} for pair in pairs)

    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = [path.name for path in files if chooses(nodes_of(path))]
    assert found == ["mindrecord.py"]


def test_a_publishing_rename_is_made_in_one_place() -> None:
    """Shards, notes and plans move inside a work folder; a name that others read is given by publish.py alone."""
    for name, nodes in outside_records():
        if name.startswith("imnet_prep/") and not name.startswith("imnet_prep/download/"):
            allowed = {"imnet_prep/files.py", "imnet_prep/build/shard_task.py", "imnet_prep/build/workdir.py"}
            functions = [dotted(node.func) for node in nodes if isinstance(node, ast.Call)]
            renames = [function for function in functions if function in ("rename", "shutil.move")]
            assert not renames or name in allowed, name
