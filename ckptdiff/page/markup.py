"""Make HTML and SVG of elements; whatever is not an element already is text, and escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from ckptdiff.report.text import safe

_CHILDLESS = ("meta", "link", "rect", "line", "path", "circle", "polyline")

_SHARE = re.compile(r"(?<=\d) %")


class Html(str):
    """Markup that is complete and safe as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """Text with what means something in markup, and what does not print, escaped; a number stays with its percent."""
    return value if isinstance(value, Html) else Html(_SHARE.sub("\u00a0%", exact(value)))


def exact(value: object) -> Html:
    """Text that is to be copied, with nothing but what has to be escaped."""
    return Html(escape(safe(str(value))))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element: ``class_`` is the attribute class, ``text_anchor`` is text-anchor, and None is no attribute."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_plain(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _CHILDLESS and not children:
        return Html(f"<{name}{said}/>")
    return Html(f"<{name}{said}>{''.join(map(text, children))}</{name}>")


def _plain(value: object) -> str:
    """The value of an attribute; coordinates have two digits behind the point at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else text(value)


def joined(parts: Iterable[object]) -> Html:
    """Parts one after the other."""
    return Html("".join(map(text, parts)))


def section(name: str, title: str, *children: object) -> Html:
    """A part of the page, under a heading."""
    return Html(f"{tag('section', tag('h2', title), *children, id=name)}\n")


def left_out(why: str) -> Html:
    """Say that something is not there."""
    return tag("p", tag("b", "Left out: "), why, class_="left-out")


def table(
    titles: Sequence[object], rows: Iterable[Sequence[object]], *, left: int = 1, name: str | None = None
) -> Html:
    """A table whose first `left` columns are text, and the others numbers."""
    # Padding is an attribute, for pages whose style sheet is forbidden.
    head = tag("tr", *(tag("th", title, scope="col") for title in titles))
    body = (f"{tag('tr', *(tag('td', cell) for cell in row))}\n" for row in rows)
    made = tag(
        "table", tag("thead", head), tag("tbody", *map(Html, body)), cellpadding=4, class_=f"left{left}", id=name
    )
    return tag("div", made, class_="wide")
