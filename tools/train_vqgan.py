"""The same as `vqt2i train_vqgan`; the code is in vqt2i/cli/train_vqgan.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_vqgan", *sys.argv[1:]]))
