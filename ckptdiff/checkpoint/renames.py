"""Apply the ``--map OLD=NEW`` renames that a user gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptdiff.errors import OptionError

__all__ = ["Rename", "parse_renames", "rename_all"]

_FORM = "OLD=NEW, where OLD is a regular expression and NEW its replacement (\\1 is the first group)"


@dataclass(frozen=True, slots=True)
class Rename:
    """One substitution, applied wherever it matches inside a name.

    Attributes
    ----------
    text : str
        As the user wrote it.
    pattern : re.Pattern
        What to replace.
    replacement : str
        By what, in the syntax of `re.sub`.
    """

    text: str
    pattern: re.Pattern[str]
    replacement: str


def parse_renames(texts: Sequence[str]) -> tuple[Rename, ...]:
    """Parse ``OLD=NEW`` texts; the last ``=`` divides, so that OLD may hold ``(?=...)``.

    Raises
    ------
    OptionError
        No ``=``, an empty OLD, an invalid regular expression, or a replacement that names an unknown group.
    """
    return tuple(_parse(text) for text in texts)


def rename_all(names: Iterable[str], renames: Sequence[Rename]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Apply every rename, in order, to every name.

    Returns
    -------
    dict of str to str
        The new name of each name, also where nothing changed.
    tuple of str
        Warnings: renames that changed no name.

    Raises
    ------
    OptionError
        Two names become one.
    """
    if not renames:
        return {name: name for name in names}, ()
    renamed: dict[str, str] = {}
    owner: dict[str, str] = {}
    used: set[Rename] = set()
    for name in names:
        new = name
        for rename in renames:
            before, new = new, rename.pattern.sub(rename.replacement, new)
            if new != before:
                used.add(rename)
        other = owner.setdefault(new, name)
        if other != name:
            raise OptionError(
                "--map gives two tensors of the base one name",
                tensor=new,
                expected="different names",
                found=f"{other} and {name}",
                hint="make OLD match only one of them, for example with ^ and $",
            )
        renamed[name] = new
    unused = tuple(f"--map {rename.text} changed no name of the base" for rename in renames if rename not in used)
    return renamed, unused


def _parse(text: str) -> Rename:
    old, equals, new = text.rpartition("=")
    if not equals or not old:
        raise OptionError("--map needs a pattern and a replacement", expected=_FORM, found=text)
    try:
        pattern = re.compile(old)
        # Substituting in an empty text checks the replacement's groups now rather than at the first match.
        pattern.sub(new, "")
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        raise OptionError(
            "--map cannot be used", expected=_FORM, found=f"{text} ({str(error) or 'too deep'})"
        ) from error
    return Rename(text, pattern, new)
