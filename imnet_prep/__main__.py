"""``imnet-prep`` and ``python -m imnet_prep``.

Spawned processes import this module again; they need no command line, so it is imported where it runs.
"""


def main() -> None:
    """Run the command ``imnet-prep``."""
    from imnet_prep.cli.prep import main as command

    command(prog_name="imnet-prep")


if __name__ == "__main__":
    main()
