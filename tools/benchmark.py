"""The same as `vqt2i benchmark`; the code is in vqt2i/cli/benchmark.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
