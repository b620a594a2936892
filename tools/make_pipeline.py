"""The same as `vqt2i make_pipeline`; the code is in vqt2i/cli/make_pipeline.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["make_pipeline", *sys.argv[1:]]))
