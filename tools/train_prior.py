"""The same as `vqt2i train_prior`; the code is in vqt2i/cli/train_prior.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_prior", *sys.argv[1:]]))
