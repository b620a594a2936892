"""The same as `vqt2i export`; the code is in vqt2i/cli/export.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
