"""The same as `vqt2i compare`; the code is in vqt2i/cli/compare.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
