from fnmatch import fnmatchcase

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint.globs import Globs, names_of

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


@settings(deadline=None)
@given(PATTERNS, st.lists(TEXT, min_size=1, max_size=4, unique=True))
def test_a_name_stands_for_itself_and_a_glob_for_what_it_matches(wanted, names):
    expected = {
        text: [text] if text in names else [name for name in names if fnmatchcase(name, text)] for text in wanted
    }
    assert names_of(wanted, names) == expected


def test_a_name_that_looks_like_a_glob_is_a_name():
    assert names_of(["w[0]", "w?", "x"], ["w0", "w[0]"]) == {"w[0]": ["w[0]"], "w?": ["w0"], "x": []}
