"""The same as `vqt2i plan`; the code is in vqt2i/cli/plan.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
