"""``python -m imnet_prep``: the command ``imnet-prep``."""

from imnet_prep.cli.prep import main

if __name__ == "__main__":
    main(prog_name="imnet-prep")
