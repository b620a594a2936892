"""The same as `vqt2i probe`; the code is in vqt2i/cli/probe.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
