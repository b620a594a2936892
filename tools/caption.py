"""The same as `vqt2i caption`; the code is in vqt2i/cli/caption.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
