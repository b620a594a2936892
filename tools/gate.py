"""The same as `vqt2i gate`; the code is in vqt2i/cli/gate.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["gate", *sys.argv[1:]]))
