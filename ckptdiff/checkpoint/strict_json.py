"""Parse JSON as a checkpoint may hold it: no repeated key, no NaN, no number or nesting without bound."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from itertools import chain
from typing import Any, NoReturn

__all__ = ["JsonProblemError", "parse_object"]

# Twenty characters hold every 64-bit integer with its sign.
_LONGEST_INTEGER = 20
_BEFORE_NUMBERS = b":", b",", b"[", b" ", b"\t", b"\n", b"\r"
_AS_COLONS = bytes.maketrans(b"".join(_BEFORE_NUMBERS), b":" * len(_BEFORE_NUMBERS))
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonProblemError(ValueError):
    """Text that is not the JSON object it should be.

    Parameters
    ----------
    problem : str
        What is wrong, as the end of a sentence that starts with the text's name ("is not UTF-8").
    expected, found : str, optional
        What correct text would hold, and what this one holds.
    """

    def __init__(self, problem: str, *, expected: str | None = None, found: str | None = None) -> None:
        self.problem = problem
        self.expected = expected
        self.found = found
        super().__init__(problem)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object.

    Parameters
    ----------
    raw : bytes
        UTF-8 text; white space around the object is allowed, a byte order mark is not.

    Returns
    -------
    dict
        Integers of up to 64 bits are ``int``; longer ones and ``-0`` are ``float``, so that a check for ``int``
        refuses them.

    Raises
    ------
    JsonProblemError
        Not UTF-8, not JSON, not an object, a key given twice at any level, ``NaN`` or ``Infinity``, a number
        beyond float64, a lone surrogate, or nesting too deep to parse.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonProblemError(
            "is not UTF-8", expected="UTF-8 text", found=f"byte 0x{raw[error.start]:02x} at {error.start}"
        ) from None
    try:
        # Python's own reader of integers takes a tenth of the time, and is as good where all are short.
        integer = _integer if _may_hold_odd_integers(raw) else int
        read = partial(json.loads, text, parse_int=integer, parse_float=_finite, parse_constant=_refuse_constant)
        value = read()
        # Of a key given twice the reader keeps one, and a colon is left over; so it is where strings hold colons.
        if raw.count(b":") != _keys(value):
            value = read(object_pairs_hook=_object_of_unique_keys)
    except json.JSONDecodeError as error:
        raise JsonProblemError(
            "is not valid JSON", expected="one JSON object", found=f"{error.msg} at character {error.pos}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise JsonProblemError("is not a JSON object", expected="{...}", found=type(value).__name__)
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _too_deep() -> JsonProblemError:
    return JsonProblemError(
        "is nested too deeply", expected="a few levels of nesting", found="more than Python can parse"
    )


def _keys(value: object) -> int:
    """Keys of an object, of those that are values of its keys, and of those in lists that are: all there are."""
    inner = [value, *(value.values() if isinstance(value, dict) else ())]
    listed = chain.from_iterable(one for one in inner if isinstance(one, list))
    return sum(len(one) for one in chain(inner, listed) if isinstance(one, dict))


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonProblemError("repeats a key", expected="each key once", found=f"{key!a} twice")
            seen.add(key)
    return result


def _may_hold_odd_integers(raw: bytes) -> bool:
    """Whether "-0" or many digits stand where a number may begin, not only within names and digests."""
    # An index holds "-0" in each name of a shard, and a search for one after another of what may stand before it takes
    # ten times as long.
    if b"-0" in raw and b":-0" in raw.translate(_AS_COLONS):
        return True
    digits, zeros = raw.translate(_DIGITS_AS_ZEROS), b"0" * _LONGEST_INTEGER
    at = digits.find(zeros)
    while at > 0 and digits[at - 1 : at] not in (*_BEFORE_NUMBERS, b"-"):
        at = digits.find(zeros, at + _LONGEST_INTEGER)
    return at >= 0


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER or text == "-0":
        return _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonProblemError("holds a number out of range", found=text[:40])
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise JsonProblemError("is not valid JSON", expected="numbers, not constants", found=text)


def _refuse_lone_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep() from None
    except UnicodeEncodeError as error:
        raise JsonProblemError(
            "holds half of a surrogate pair",
            expected="Unicode text",
            found=ascii(error.object[max(0, error.start - 20) : error.end + 20]),
        ) from None
