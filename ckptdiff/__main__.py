"""``python -m ckptdiff`` is the command line."""

from ckptdiff.cli import program

if __name__ == "__main__":
    program()
