"""The same as `vqt2i evaluate`; the code is in vqt2i/cli/evaluate.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
