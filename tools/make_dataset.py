"""The same as `vqt2i make_dataset`; the code is in vqt2i/cli/make_dataset.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["make_dataset", *sys.argv[1:]]))
