import pytest

from ckptdiff.checkpoint.renames import parse_renames, rename_all
from ckptdiff.errors import OptionError


def renamed(names, *texts):
    return rename_all(names, parse_renames(texts))


def test_groups_and_order():
    result, warnings = renamed(["h.1.attn", "wte"], r"^h\.(\d+)=layers.\1", "layers=blocks")
    assert result == {"h.1.attn": "blocks.1.attn", "wte": "wte"}
    assert warnings == ()


def test_the_last_equals_sign_divides():
    result, _ = renamed(["a.w", "b.w"], r"^(?=a)=x.")
    assert result == {"a.w": "x.a.w", "b.w": "b.w"}


def test_removing_a_part():
    assert renamed(["encoder.w"], r"^encoder\.=")[0] == {"encoder.w": "w"}


def test_names_may_be_swapped():
    assert renamed(["a", "b"], "^a$=c", "^b$=a", "^c$=b")[0] == {"a": "b", "b": "a"}


def test_a_rename_without_effect_is_told():
    assert renamed(["a"], "x=y", "a=b")[1] == ("--map x=y changed no name of the base",)


@pytest.mark.parametrize(
    "text", ["", "a", "=", "=b", "(=b", "[a=b", r"a=\1", r"(a)=\2", r"a=\g<x>", "a*{=**=b", r"a=\q"]
)
def test_what_cannot_be_used(text):
    with pytest.raises(OptionError) as caught:
        parse_renames([text])
    assert "--map" in caught.value.problem
    assert text in caught.value.found
    assert "OLD=NEW" in caught.value.expected


@pytest.mark.parametrize("text", ["b=a", "[ab]=c"])
def test_two_names_that_become_one(text):
    with pytest.raises(OptionError, match="--map gives two tensors of the base one name") as caught:
        renamed(["a", "b"], text)
    assert caught.value.found == "a and b"
