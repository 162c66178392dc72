"""Select tensors by shell-style patterns: ``--include`` and ``--exclude``, and lists of names or globs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import translate

__all__ = ["Globs", "names_of"]


class Globs:
    """Shell-style patterns that select tensors; case matters, and ``*`` matches dots and slashes too.

    Parameters
    ----------
    include : sequence of str
        What to keep; nothing means everything.
    exclude : sequence of str
        What to leave out, whatever `include` says.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include = [(text, re.compile(translate(text))) for text in include]
        self._exclude = [(text, re.compile(translate(text))) for text in exclude]

    def select(self, *names: str) -> bool:
        """Whether a tensor that goes by these names (one, or one a side) is to be kept."""
        if self._exclude and any(pattern.match(name) for _, pattern in self._exclude for name in names):
            return False
        return not self._include or any(pattern.match(name) for _, pattern in self._include for name in names)

    def unmatched(self, names: Iterable[str], parts: Iterable[str] = ()) -> list[str]:
        """Warn of every pattern that matches none of these names; it may match a part, which is not selected alone."""
        known, inner = list(names), list(parts)
        return [
            f"{option} {text} matches no tensor"
            + " of its own: scales and codes belong to their weight" * any(map(pattern.match, inner))
            for option, patterns in (("--include", self._include), ("--exclude", self._exclude))
            for text, pattern in patterns
            if not any(pattern.match(name) for name in known)
        ]


def names_of(wanted: Iterable[str], names: Collection[str]) -> dict[str, list[str]]:
    """What each of a list of names or globs stands for among `names`, in their order.

    A text that is a name stands for that one alone, whatever it would match as a glob: names may hold brackets.
    """
    return {text: [text] if text in names else list(filter(Globs([text]).select, names)) for text in wanted}
