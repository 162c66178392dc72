"""Read a page back with Python's own parsers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

CHILDLESS = {"meta", "link", "rect", "line", "path", "circle", "polyline"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Elements, attributes and text of a page, which has to be balanced."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        """By the id of the section, or by the element outside of sections."""
        self.cells: dict[str, list[list[str]]] = {}
        """Rows of the tables of each section."""
        self._section = ""
        self.feed(source)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag == "tr":
            self.cells.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.cells[self._section][-1].append("")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert tag in CHILDLESS

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        place = self._section or (self.open[-1] if self.open else "")
        self.text.setdefault(place, []).append(data)
        if {"td", "th"} & set(self.open) and not {"script", "style"} & set(self.open):
            self.cells[self._section][-1][-1] += data.replace("\xa0", " ")

    def sections(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.elements if tag == "section"]

    def said(self, section: str) -> str:
        return "".join(self.text[section]).replace("\xa0", " ")

    def document(self) -> Any:
        (found,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', self.source, re.DOTALL)
        assert not set("<>&") & set(found)
        return json.loads(found)

    def pictures(self) -> list[ElementTree.Element]:
        """Every picture, as XML."""
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]

    def hints(self, label: str) -> list[str]:
        """What marks of the pictures of a label say."""
        pictures = [picture for picture in self.pictures() if picture.get("aria-label") == label]
        return [str(title.text).replace("\xa0", " ") for picture in pictures for title in picture.iter(f"{SVG}title")]
