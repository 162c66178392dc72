import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=3), inner)),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES), st.booleans())
def test_what_json_writes_is_read_back(value, ascii_only):
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize("text", ["-0", "100000000000000000000000", "1.0", "1e2"])
def test_numbers_that_are_no_64_bit_integers_are_floats(text):
    value = parse_object(f'{{"a": {text}}}'.encode())["a"]
    assert type(value) is float
    assert value == float(text)


@pytest.mark.parametrize("text", ["-0", "100000000000000000000000", "-100000000000000000000000"])
def test_such_numbers_are_found_behind_names_and_digests_that_look_like_them(text):
    digests = ["0123456789012345678901234567890123456789", "a12345678901234567890123", "model-00001-of-00002"]
    for number in (text, f" {text}", f"\t{text}", f"\r{text}", f"\n{text}", f"[{text}]", f"[1,{text}]"):
        raw = json.dumps({"digests": [{"after": one} for one in digests]})[:-1] + f',"a":{number}}}'
        value = parse_object(raw.encode())
        found = value["a"][-1] if isinstance(value["a"], list) else value["a"]
        assert type(found) is float and found == float(text)
        assert [one["after"] for one in value["digests"]] == digests


def test_a_key_given_twice_in_an_object_of_a_list_is_found():
    with pytest.raises(JsonProblemError, match="repeats a key"):
        parse_object(b'{"tensors":[{"a":1},{"a":1,"a":2}]}')
    assert parse_object(b'{"tensors":[{"a":1},{"a":2}]}') == {"tensors": [{"a": 1}, {"a": 2}]}


@pytest.mark.parametrize("text", ["[1]", '"a"', "1", "null", "true"])
def test_anything_but_an_object_is_refused(text):
    with pytest.raises(JsonProblemError, match="is not a JSON object"):
        parse_object(text.encode())


def test_the_place_of_a_mistake_is_told():
    with pytest.raises(JsonProblemError) as caught:
        parse_object(b'{"a": 1,}')
    assert "at character 8" in caught.value.found


def test_nesting_around_the_limit_of_the_parser():
    """Parsing and looking for surrogates run out of stack at depths of their own; either way it is refused."""
    problems = set()
    for depth in range(700, 1000):
        with pytest.raises(JsonProblemError) as caught:
            parse_object(b'{"a":' * depth + b'"\\ud800"' + b"}" * depth)
        problems.add(caught.value.problem)
    assert problems <= {"holds half of a surrogate pair", "is nested too deeply"}


def twice(value):
    """Whether a key stands twice in one of the objects of nested lists of (key, value), which stand for objects."""
    if not isinstance(value, list):
        return False
    keys = [key for key, _ in value]
    return len(set(keys)) < len(keys) or any(twice(inner) for _, inner in value)


def as_text(value):
    if not isinstance(value, list):
        return json.dumps(value)
    return "{" + ",".join(f"{json.dumps(key)}:{as_text(inner)}" for key, inner in value) + "}"


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.lists(st.tuples(st.sampled_from("ab:"), st.sampled_from([1, "a", "b:c", '":"'])), max_size=3),
        lambda inner: st.lists(st.tuples(st.sampled_from("ab:"), inner), max_size=3),
        max_leaves=6,
    )
)
def test_a_key_given_twice_is_found_at_any_level_whatever_strings_hold(pairs):
    raw = as_text(pairs).encode()
    if twice(pairs):
        with pytest.raises(JsonProblemError, match="repeats a key"):
            parse_object(raw)
    else:
        assert parse_object(raw) == json.loads(raw)
