"""Conversion of checkpoints, run from a checkout: python convert.py SOURCE TARGET."""

import sys

from mlx_v4flash.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]], prog_name="convert.py")
