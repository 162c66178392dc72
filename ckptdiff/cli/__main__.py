"""``python -m ckptdiff.cli``."""

from ckptdiff.cli import program

program()
