"""The same as `vqt2i encode_dataset`; the code is in vqt2i/cli/encode_dataset.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode_dataset", *sys.argv[1:]]))
