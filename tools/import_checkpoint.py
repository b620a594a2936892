"""The same as `vqt2i import_checkpoint`; the code is in vqt2i/cli/import_checkpoint.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["import_checkpoint", *sys.argv[1:]]))
