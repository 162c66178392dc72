from __future__ import annotations

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.runfile.schema import escape_name, escape_text, mask_chunk_bytes, packed_bytes, unescape

NAMES = st.text(st.characters(exclude_categories=["Cs"]))


@given(NAMES)
def test_names_come_back(name: str) -> None:
    assert unescape(escape_name(name)) == name
    assert unescape(escape_text(name)) == name


@given(NAMES, NAMES)
def test_different_names_stay_different(one: str, other: str) -> None:
    assert (escape_name(one) == escape_name(other)) == (one == other)


@given(NAMES)
def test_escaped_names_are_plain_links(name: str) -> None:
    link = escape_name(name)
    assert link
    assert "/" not in link
    assert not link.startswith(".")
    assert all(ord(character) >= 0x20 and character != "\x7f" for character in link)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("", "%"),
        ("%", "%25"),
        ("a/b", "a%2Fb"),
        ("..", "%2E."),
        ("\n\x7f", "%0A%7F"),
        ("grün", "grün"),
    ],
)
def test_escaping_is_as_documented(name: str, link: str) -> None:
    assert escape_name(name) == link


@given(st.lists(NAMES, unique=True, max_size=5))
def test_hdf5_keeps_escaped_names_apart(names: list[str]) -> None:
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        for name in names:
            file.create_dataset(escape_name(name), data=1)
        assert sorted(map(unescape, file)) == sorted(names)


@pytest.mark.parametrize(
    ("numel", "size", "chunk"),
    [(0, 0, 0), (1, 1, 1), (8, 1, 1), (9, 2, 2), (1 << 20, 131072, 131072), ((1 << 20) + 1, 131073, 131072)],
)
def test_sizes_of_packed_masks(numel: int, size: int, chunk: int) -> None:
    assert packed_bytes(numel) == size
    assert mask_chunk_bytes(numel) == chunk


@given(st.text(st.one_of(st.sampled_from("%/. \0\x1f\x7f\x80\u202e"), st.characters()), max_size=8))
def test_what_is_escaped_is_what_the_documentation_says(name: str) -> None:
    odd = {*map(chr, range(0x20)), "\x7f", "%", "/"}
    spelt = [f"%{ord(one):02X}" if one in odd or (one == "." and at == 0) else one for at, one in enumerate(name)]
    assert escape_name(name) == ("".join(spelt) or "%")
    assert escape_text(name) == name.replace("%", "%25").replace("\0", "%00")
