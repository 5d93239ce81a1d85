"""docs/command-line.md names every exit code and every environment variable, and its completion works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imnet_prep.errors import ImnetError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
READ = re.compile(r"""(?:environ(?:\.get|\.setdefault)?[(\[]|getenv\(|ENVIRONMENT = )"(\w+)\"""")


def error_classes(parent: type[ImnetError] = ImnetError) -> Iterator[type[ImnetError]]:
    yield parent
    for child in parent.__subclasses__():
        yield from error_classes(child)


def test_every_exit_code_is_described() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes == {0, 2, *(error.exit_code for error in error_classes())}


def test_every_environment_variable_is_named() -> None:
    files = [path for folder in ("imnet_prep", "mbv2", "cli") for path in (ROOT / folder).rglob("*.*")]
    code = "".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".cc"))
    found = set(READ.findall(code))
    assert {"NO_COLOR", "MBV2_KERNELS", "MBV2_ISA", "SSL_CERT_FILE"} <= found
    assert {name for name in found if f"`{name}`" not in PAGE} == set()


@pytest.mark.parametrize(
    ("program", "words", "completed"),
    [("imnet-prep", "verify --level h", "plain,hash"), ("mbv2", "train --freeze ba", "plain,backbone")],
)
def test_the_shell_s_function_asks_the_command(program: str, words: str, completed: str) -> None:
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    assert f'eval "$({variable}=bash_source {program})"' in PAGE
    asked = {"COMP_WORDS": f"{program} {words}", "COMP_CWORD": "3", variable: "bash_complete"}
    command = Path(sys.executable).with_name(program)
    done = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == completed + "\n"
