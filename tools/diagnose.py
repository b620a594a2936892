"""The same as `vqt2i diagnose`; the code is in vqt2i/cli/diagnose.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
