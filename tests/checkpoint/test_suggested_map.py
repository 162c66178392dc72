"""Rules that are proposed for --map: what they pair, how few there are, and when there are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.checkpoint import open_checkpoint, pair
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import sampled_agreement
from ckptdiff.checkpoint.suggested_map import SuggestedMap, advice, suggest_map
from ckptdiff.cli import main
from ckptdiff.errors import PairingError

Tensors = Mapping[str, np.ndarray]


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)


def moved(array: np.ndarray, seed: int = 9) -> np.ndarray:
    """A tenth of the values changed."""
    at = np.random.default_rng(seed).random(array.shape) < 0.1
    return np.where(at, array * array.dtype.type(1.5), array).astype(array.dtype)


LLAMA = {
    "model.embed_tokens.weight": values(0, 24, 16),
    **{
        f"model.layers.{layer}.self_attn.{name}_proj.weight": values(7 * layer + at, 16, 16)
        for layer in range(3)
        for at, name in enumerate("qkvo", 1)
    },
    "model.norm.weight": values(99, 16),
}


@pytest.fixture
def suggest(tmp_path: Path) -> Callable[..., SuggestedMap]:
    def call(base: Tensors, tuned: Tensors, *, read: bool = True, renames: Sequence[str] = ()) -> SuggestedMap:
        for side, tensors in (("base", base), ("tuned", tuned)):
            save_file({name: array.copy() for name, array in tensors.items()}, tmp_path / f"{side}.safetensors")
        sides = [open_checkpoint(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
        matched, _ = match_names(sides[0].tensors, sides[1].tensors, renames)
        there = set(matched.values())
        with open_shards("pread") as shards:
            return suggest_map(
                *sides,
                matched,
                [name for name in base if name not in matched],
                [name for name in tuned if name not in there],
                renames,
                sampled_agreement(shards) if read else None,
            )

    return call


def paired(base: Tensors, tuned: Tensors, rules: Sequence[str]) -> dict[str, str]:
    return match_names(base, tuned, rules)[0]


@pytest.mark.parametrize("prefix", ["policy.", "actor.module.", "pretrained_model.", "student.model."])
@pytest.mark.parametrize("read", [True, False])
def test_one_prefix_that_explains_all_names(suggest: Callable[..., SuggestedMap], prefix: str, read: bool) -> None:
    wrapped = {f"{prefix}{name}": array for name, array in LLAMA.items()}
    for base, tuned in ((wrapped, LLAMA), (LLAMA, wrapped)):
        found = suggest(base, tuned, read=read)
        assert len(found.rules) == 1 and found.pairs == len(LLAMA) and not found.undecided
        assert all(
            name.endswith(other) or other.endswith(name) for name, other in paired(base, tuned, found.rules).items()
        )
        assert len(paired(base, tuned, found.rules)) == len(LLAMA)


def test_the_rule_for_most_and_the_rule_for_the_rest(suggest: Callable[..., SuggestedMap]) -> None:
    one, two, three = values(1, 16, 16), values(2, 16, 16), values(3, 16)
    base = {"encoder.layers.0.w.weight": one, "encoder.layers.1.w.weight": two, "encoder.norm.weight": three}
    tuned = {
        "encoder.encoder.layers.0.w.weight": one,
        "encoder.encoder.layers.1.w.weight": two,
        "encoder.final_norm.weight": three,
    }
    found = suggest(base, tuned)
    assert found.rules == (r"^encoder\.layers\.=encoder.encoder.layers.", r"\.norm\.=.final_norm.") and found.pairs == 3
    assert len(paired(base, tuned, found.rules[:1])) == 2
    assert paired(base, tuned, found.rules) == dict(zip(base, tuned, strict=True))


def vit(names: Mapping[str, str]) -> dict[str, np.ndarray]:
    shapes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "up": (32, 16), "down": (16, 32)}
    return {
        f"vit.{names['layer']}.{layer}.{names[key]}.{parameter}": (
            moved(values(10 * layer + at, *shape)) if parameter == "weight" else np.zeros(shape[:1], np.float32)
        )
        for layer in range(2)
        for at, (key, shape) in enumerate(shapes.items())
        for parameter in ("weight", "bias")
    }


OLD = {
    "layer": "encoder.layer",
    **{key: f"attention.attention.{name}" for key, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    **{"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
}
NEW = {
    "layer": "layers",
    **{key: f"attention.{key}_proj" for key in "qkvo"},
    **{"up": "mlp.fc1", "down": "mlp.fc2"},
}


def test_values_decide_among_names_of_equal_shape(suggest: Callable[..., SuggestedMap]) -> None:
    base = vit(OLD)
    tuned = {name: moved(array, 3) for name, array in vit(NEW).items()}
    for one, other in ((base, tuned), (tuned, base)):
        found = suggest(one, other)
        assert found.pairs == len(base) and not found.undecided
        assert paired(one, other, found.rules) == dict(zip(one, other, strict=True))


def test_no_guess_among_equals(suggest: Callable[..., SuggestedMap]) -> None:
    """Without values, three projections of one shape are one as good as the other: their names are not proof."""
    found = suggest(vit(OLD), vit(NEW), read=False)
    by_rules = paired(vit(OLD), vit(NEW), found.rules)
    assert all(".intermediate." in name or "output.dense" in name for name in by_rules)
    assert sum("attention.attention" in name for name in found.undecided) == 12


@pytest.mark.parametrize("read", [True, False])
def test_neither_shape_nor_values_tell(suggest: Callable[..., SuggestedMap], read: bool) -> None:
    base = {"x.a.weight": values(1, 8, 8), "x.b.weight": values(2, 8, 8)}
    tuned = {"x.c.weight": values(3, 8, 8), "x.d.weight": values(4, 8, 8)}
    found = suggest(base, tuned, read=read)
    assert found.rules == () and set(found.undecided) == set(base)
    assert found.warnings[0].startswith("2 tensors only in base could be any of several only in tuned")


def test_constants_tell_nothing(suggest: Callable[..., SuggestedMap]) -> None:
    ones = np.ones(16, np.float32)
    found = suggest({"x.a.weight": ones, "x.b.weight": ones}, {"x.c.weight": ones, "x.d.weight": ones})
    assert found.rules == () and len(found.undecided) == 2


def test_a_head_of_another_name_has_to_have_its_values(suggest: Callable[..., SuggestedMap]) -> None:
    rest, head = {"gpt_neox.norm.weight": values(1, 16)}, values(2, 64, 16)
    found = suggest({**rest, "embed_out.weight": head}, {**rest, "lm_head.weight": moved(head)})
    assert found.rules == (r"^embed_out\.=lm_head.",) and found.pairs == 1
    assert suggest({**rest, "embed_out.weight": head}, {**rest, "lm_head.weight": values(3, 64, 16)}).rules == ()
    assert suggest({**rest, "embed_out.weight": head}, {**rest, "lm_head.weight": values(3, 32, 16)}).rules == ()


def test_values_speak_against_a_pair_of_like_names(suggest: Callable[..., SuggestedMap]) -> None:
    base, other = {"model.layers.0.old.weight": values(1, 16, 16)}, values(2, 16, 16)
    assert suggest(base, {"model.layers.0.new.weight": other}).rules == ()
    assert suggest(base, {"model.layers.0.new.weight": other}, read=False).pairs == 1
    # Where the module's own name is the same, they may have been trained from nothing.
    assert suggest(base, {"model.h.0.old.weight": other}).pairs == 1


def test_dtypes_may_differ_as_far_as_they_can_be_compared(suggest: Callable[..., SuggestedMap]) -> None:
    head = values(2, 64, 16)
    assert suggest({"a.w.weight": head}, {"b.v.weight": head.astype(np.float32)}).pairs == 1
    assert suggest({"a.w.weight": head}, {"b.v.weight": np.zeros((64, 16), np.int32)}).pairs == 0


def test_what_is_paired_stays_so(suggest: Callable[..., SuggestedMap]) -> None:
    """The rules come after the user's own, and touch no name that has its counterpart."""
    array = values(1, 16, 16)
    base = {"old.a.weight": array, "x.layers.0.b.weight": moved(array), "c.b.weight": values(5, 16, 16)}
    tuned = {"new.a.weight": array, "x.layers.0.d.weight": moved(array), "c.b.weight": values(5, 16, 16)}
    found = suggest(base, tuned, renames=["^old=new"])
    assert found.pairs == 1
    assert paired(base, tuned, ["^old=new", *found.rules]) == dict(zip(base, tuned, strict=True))


def test_models_that_have_nothing_to_do_with_each_other(suggest: Callable[..., SuggestedMap]) -> None:
    base = {f"a.x{number}.y.weight": values(number, 4, 4) for number in range(60)}
    tuned = {f"b.z{number}.q.weight": values(number + 100, 4, 4) for number in range(70)}
    assert suggest(base, tuned).rules == ()


def test_an_equals_sign_cannot_be_in_a_rule(suggest: Callable[..., SuggestedMap]) -> None:
    array = values(1, 8, 8)
    assert suggest({"a.w": array}, {"a=b.w": array}).rules == ()
    assert suggest({"a=b.w": array}, {"a.w": array}).rules == (r"^a=b\.=a.",)


_PART = st.sampled_from(["a", "b", "layers", "0", "1", "w", "#", "x=y", "\\1", "(", "[a]"])


@given(
    st.lists(st.lists(_PART, min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=6),
    st.lists(st.lists(_PART, min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=6),
)
def test_whatever_is_proposed_pairs_what_it_says(tmp_path_factory, base: list[str], tuned: list[str]) -> None:
    folder = tmp_path_factory.mktemp("sides")
    for side, names in (("base", base), ("tuned", tuned)):
        save_file({name: np.zeros(len(name) % 2 + 1, np.float32) for name in names}, folder / f"{side}.safetensors")
    sides = [open_checkpoint(folder / f"{side}.safetensors") for side in ("base", "tuned")]
    before = match_names(base, tuned)[0]
    there = set(before.values())
    alone = [name for name in base if name not in before], [name for name in tuned if name not in there]
    found = suggest_map(*sides, before, *alone)
    after = match_names(base, tuned, found.rules)[0]
    assert before.items() <= after.items() and len(after) - len(before) == found.pairs
    for name in after.keys() - before.keys():
        assert sides[0].tensors[name].shape == sides[1].tensors[after[name]].shape


def test_rules_are_quoted_for_a_shell() -> None:
    assert advice([r"^a\.=", "x=y"]) == r"--map '^a\.=' --map x=y"
    assert advice([]) is None


class TestAsUsersSeeIt:
    def write(self, folder: Path, base: Tensors, tuned: Tensors) -> list[str]:
        for side, tensors in (("base", base), ("tuned", tuned)):
            save_file({name: array.copy() for name, array in tensors.items()}, folder / f"{side}.safetensors")
        return [str(folder / f"{side}.safetensors") for side in ("base", "tuned")]

    def test_no_name_in_common(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sides = self.write(tmp_path, {f"policy.{name}": array for name, array in LLAMA.items()}, LLAMA)
        with pytest.raises(PairingError, match="no tensor name in common") as caught:
            pair(*map(open_checkpoint, sides))
        assert caught.value.hint == r"--map '^policy\.=' (pairs 14 tensors)"
        assert main(["diff", *sides]) == 2
        assert r"try:      --map '^policy\.=' (pairs 14 tensors)" in capsys.readouterr().err

    def test_some_names_in_common(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        head = values(5, 24, 16)
        base, tuned = {**LLAMA, "value_head.weight": head}, {**LLAMA, "score.weight": moved(head)}
        sides = self.write(tmp_path, base, tuned)
        run = tmp_path / "run.h5"
        assert main(["diff", *sides, "-o", str(run), "--no-progress"]) == 0
        assert r"to pair more of them: --map '^value_head\.=score.'" in capsys.readouterr().out
        assert main(["show", str(run), "--format", "json"]) == 0
        (rule,) = json.loads(capsys.readouterr().out)["suggested_map"]
        found = ckptdiff.diff(*sides, renames=[rule])
        assert found.counts["matched"] == len(base) and found.suggested_map == ()
