from fnmatch import fnmatchcase

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint.globs import Globs

TEXT = st.text("aA.*?[]!\n/", max_size=5)
PATTERNS = st.lists(TEXT, max_size=2)


@settings(deadline=None)
@given(PATTERNS, PATTERNS, st.lists(TEXT, min_size=1, max_size=2))
def test_selection_is_that_of_fnmatchcase(include, exclude, names):
    def any_match(patterns):
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

    expected = (not include or any_match(include)) and not any_match(exclude)
    assert Globs(include, exclude).select(*names) == expected


def test_patterns_that_match_nothing_are_told():
    globs = Globs(["*.mlp.*", "mlp"], ["*bias", "x"])
    assert globs.unmatched(["a.mlp.weight", "a.mlp.bias"]) == [
        "--include mlp matches no tensor",
        "--exclude x matches no tensor",
    ]
