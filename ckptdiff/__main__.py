"""``python -m ckptdiff`` is the command line."""

import sys

from ckptdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
