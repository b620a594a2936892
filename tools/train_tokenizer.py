"""The same as `vqt2i train_tokenizer`; the code is in vqt2i/cli/train_tokenizer.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_tokenizer", *sys.argv[1:]]))
