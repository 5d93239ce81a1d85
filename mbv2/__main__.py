"""``python -m mbv2``: the command ``mbv2``."""

from imnet_prep.cli.mobilenet import main

if __name__ == "__main__":
    main(prog_name="mbv2")
