"""``mbv2`` and ``python -m mbv2``.

Spawned processes import this module again; they need no command line, so it is imported where it runs.
"""


def main() -> None:
    """Run the command ``mbv2``."""
    from imnet_prep.cli.mobilenet import main as command

    command(prog_name="mbv2")


if __name__ == "__main__":
    main()
