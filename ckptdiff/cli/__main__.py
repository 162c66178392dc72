"""``python -m ckptdiff.cli``."""

import sys

from ckptdiff.cli import main

sys.exit(main())
