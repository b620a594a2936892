"""The same as `vqt2i edit`; the code is in vqt2i/cli/edit.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["edit", *sys.argv[1:]]))
