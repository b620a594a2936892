"""The same as `vqt2i generate`; the code is in vqt2i/cli/generate.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
