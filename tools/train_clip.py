"""The same as `vqt2i train_clip`; the code is in vqt2i/cli/train_clip.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_clip", *sys.argv[1:]]))
