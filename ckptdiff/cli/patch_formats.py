"""Options of the formats in which patches are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ckptdiff.errors import OptionError

_OF_KIND = dict.fromkeys(("encoding", "checksum", "version", "base_version", "level"), "delta-dir") | {
    "dense_rest": "flat"
}
"""Options of ``patch make`` and ``track --patches``, and which format takes each."""
_FORMAT_OPTIONS = (
    click.option(
        "--encoding",
        type=click.Choice(["xor", "overwrite"]),
        show_default="xor",
        help="Of a delta-dir: all bytes xor the old ones, or the changed ones, which may be applied again.",
    ),
    click.option(
        "--checksum",
        type=click.Choice(["xxh3-128", "blake3", "adler32"]),
        show_default="xxh3-128",
        help="Of the tensors in a delta-dir.",
    ),
    click.option("--level", type=int, metavar="L", show_default="1", help="Of zstd, 1 to 19, for a delta-dir."),
    click.option(
        "--dense-rest",
        is_flag=True,
        default=None,
        show_default="off",
        help="In flat: send whole what has no sparse patch, which is other than floating dtypes and new NaNs.",
    ),
)


def format_options(command: Any) -> Any:
    """Let a command take the options of formats of patches, None where they are not given."""
    for option in reversed(_FORMAT_OPTIONS):
        command = option(command)
    return command


def options_of(kind: str, given: Mapping[str, Any], flag: str = "--format") -> dict[str, Any]:
    """Those that were given, which have to be of this format."""
    own = {name: given[name] for name in _OF_KIND if given.get(name) is not None}
    for name in own:
        if _OF_KIND[name] != kind:
            raise OptionError(f"--{name.replace('_', '-')} is for {flag} {_OF_KIND[name]}", found=f"{flag} {kind}")
    return own
