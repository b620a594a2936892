"""The same as `vqt2i train_gpt`; the code is in vqt2i/cli/train_gpt.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_gpt", *sys.argv[1:]]))
