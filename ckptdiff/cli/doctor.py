"""``ckptdiff doctor``: what this machine offers, and whether it computes what it should."""

from __future__ import annotations

import sys

import click

from ckptdiff.cli.failures import OK, TROUBLE


@click.command(short_help="Say what this machine offers, and test every backend on it.")
def doctor() -> int:
    """Print versions, processor, threads, caches and GPU, and compare each backend with the NumPy reference.

    The exit code is 2 if something is not as it should be; a machine without a GPU is fine.
    """
    from ckptdiff.doctor import examine

    code = OK
    for finding in examine():
        sys.stdout.write(f"{'' if finding.ok else '!':<2}{finding.name:<18}{finding.value}\n")
        sys.stdout.flush()
        code = code if finding.ok else TROUBLE
    return code
