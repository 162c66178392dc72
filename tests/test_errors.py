from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ckptdiff import errors
from ckptdiff.errors import CheckpointError, CkptdiffError, HeaderError, RunFileError

LEAVES = [leaf for leaf in map(vars(errors).get, errors.__all__) if isinstance(leaf, type)]


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_error_is_caught_at_the_root(leaf: type[CkptdiffError]) -> None:
    assert issubclass(leaf, CkptdiffError)
    assert leaf.__doc__
    with pytest.raises(CkptdiffError, match="something is wrong"):
        raise leaf("something is wrong")


def test_damage_of_a_checkpoint_is_caught_as_such() -> None:
    for leaf in (HeaderError, errors.IndexFileError, errors.ChangedFileError):
        assert issubclass(leaf, CheckpointError)
    assert not issubclass(RunFileError, CheckpointError)


def test_the_text_holds_every_fact_and_no_more() -> None:
    error = HeaderError(
        "ends early", file=Path("a.safetensors"), tensor="w", expected=0, found="5 bytes", hint="copy it"
    )
    assert str(error).splitlines() == [
        "ends early",
        "  file:     a.safetensors",
        "  tensor:   w",
        "  expected: 0",
        "  found:    5 bytes",
        "  try:      copy it",
    ]
    assert str(HeaderError("ends early")) == "ends early"
    assert error.file == "a.safetensors"


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(RunFileError("full", file="run.h5", hint="make room")))
    assert isinstance(error, RunFileError)
    assert (error.problem, error.file, error.hint) == ("full", "run.h5", "make room")


def test_a_message_lists_the_first_few_names() -> None:
    assert errors.first_few([]) == ""
    assert errors.first_few("abc") == "a, b, c"
    assert errors.first_few(iter("abcd")) == "a, b, c, ..."
    assert errors.first_few("abc", 2, "; ") == "a; b; ..."
