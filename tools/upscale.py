"""The same as `vqt2i upscale`; the code is in vqt2i/cli/upscale.py."""

import sys

from vqt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["upscale", *sys.argv[1:]]))
