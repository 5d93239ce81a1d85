"""Options with a fixed set of values: help lists them, wrong ones exit 2, a shell completes them."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from imnet_prep.build.export_formats import FORMATS as EXPORT_FORMATS
from imnet_prep.build.options import DUPLICATES
from imnet_prep.check.verify import EXPECTATIONS, LEVELS
from imnet_prep.cli import mobilenet, prep
from imnet_prep.loader.options import NATIVE
from imnet_prep.types import SPLITS
from mbv2.recipe import Recipe
from mbv2.weights.convert import TARGETS
from mbv2.weights.export import FORMATS as MODEL_FORMATS

GROUPS = {"imnet-prep": prep.main, "mbv2": mobilenet.main}
LIBRARY = {  # those that the commands repeat, as importing them would slow every --help down
    ("imnet-prep", "verify", "level"): LEVELS,
    ("imnet-prep", "verify", "expect"): EXPECTATIONS,
    ("imnet-prep", "bench", "native"): NATIVE,
    ("imnet-prep", "export", "to"): EXPORT_FORMATS,
    ("imnet-prep", "to-mindrecord", "duplicates"): DUPLICATES,
    ("imnet-prep", "to-mindrecord", "split"): SPLITS,
    ("mbv2", "export", "kind"): MODEL_FORMATS,
    ("mbv2", "convert", "target"): TARGETS,
    ("mbv2", "train", "freeze"): Recipe.__dataclass_fields__["freeze"].metadata["choices"],
}


def choices() -> Iterator[tuple[str, str, click.Option, tuple[str, ...]]]:
    for program, group in GROUPS.items():
        for name, command in group.commands.items():
            for option in command.params:
                if isinstance(option, click.Option) and isinstance(option.type, click.Choice):
                    yield program, name, option, tuple(option.type.choices)


def test_the_choices_are_the_library_s() -> None:
    found = {(program, name, option.name): values for program, name, option, values in choices()}
    assert {key: found[key] for key in LIBRARY} == {key: tuple(values) for key, values in LIBRARY.items()}


@pytest.mark.parametrize(("program", "name", "option", "values"), choices(), ids=str)
def test_a_wrong_choice_exits_2_and_lists_the_right_ones(
    program: str, name: str, option: click.Option, values: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(GROUPS[program], [name, option.opts[0], "nonsense"])
    assert result.exit_code == 2
    assert all(f"'{value}'" in result.stderr for value in values)
    assert f"[{'|'.join(values)}]" in CliRunner().invoke(GROUPS[program], [name, "--help"], terminal_width=200).output


def test_a_shell_completes_choices_commands_and_files() -> None:
    def completed(*words: str) -> list[tuple[str, str]]:
        *arguments, incomplete = words
        found = ShellComplete(prep.main, {}, "imnet-prep", "_X").get_completions(arguments, incomplete)
        return [(item.value, item.type) for item in found]

    assert completed("verify", "--level", "h") == [("hash", "plain")]
    assert ("to-mindrecord", "plain") in completed("to")
    assert completed("info", "rec") == [("rec", "file")]
    assert completed(
        "to-mindrecord",
        "my-",
    ) == [("my-", "file")]
    assert completed("to-mindrecord", "my-photos", "--out", "r") == [("r", "file")]
