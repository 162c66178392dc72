import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import write

from ckptdiff.checkpoint import Alias, Checkpoint, Shard, TensorInfo, TensorPair, open_checkpoint, pair
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.errors import OptionError, PairingError

inodes = itertools.count(1)


def checkpoint(tensors, path="ckpt"):
    """A checkpoint of {name: (dtype, shape)} or of names, in a file of its own."""
    if not isinstance(tensors, dict):
        tensors = dict.fromkeys(tensors, ("BF16", (2, 2)))
    shard = Shard(path, 10**9, 0, 1, next(inodes), "", {})
    infos, end = {}, 100
    for name, (dtype, shape) in tensors.items():
        info = TensorInfo(name, dtype, tuple(shape), shard, end, end)
        start, end = end, end + info.numel * DTYPES[dtype].bits // 8
        infos[name] = TensorInfo(name, dtype, tuple(shape), shard, start, end)
    return Checkpoint(path, (shard,), infos, ())


def names(pairing):
    return [(pair.base.name, pair.tuned.name) for pair in pairing.pairs]


def joined(pairing):
    return "\n".join(pairing.warnings)


class TestExactNames:
    def test_pairs_are_in_the_order_of_the_base(self):
        base, tuned = checkpoint(["z", "a", "m"]), checkpoint(["a", "m", "z"])
        pairing = pair(base, tuned)
        assert names(pairing) == [("z", "z"), ("a", "a"), ("m", "m")]
        assert pairing.pairs[0] == TensorPair("z", base.tensors["z"], tuned.tensors["z"])
        assert pairing.pairs[0].tuned_name is None
        assert (pairing.only_in_base, pairing.only_in_tuned, pairing.warnings) == ((), (), ())

    def test_the_rest_is_listed(self):
        pairing = pair(checkpoint(["a", "x", "b"]), checkpoint(["y", "b", "a", "w"]))
        assert names(pairing) == [("a", "a"), ("b", "b")]
        assert (pairing.only_in_base, pairing.only_in_tuned) == (("x",), ("y", "w"))

    def test_a_checkpoint_with_itself_is_the_same_bytes(self, tmp_path):
        path = write(tmp_path / "a", {"a": ("F32", (2,)), "b": ("F32", (2,))})
        (tmp_path / "link").symlink_to("a")
        pairing = pair(open_checkpoint(path), open_checkpoint(tmp_path / "link"))
        assert [pair.same_bytes for pair in pairing.pairs] == [True, True]
        other = write(tmp_path / "b", {"a": ("F32", (2,)), "b": ("F32", (2,))})
        assert not any(pair.same_bytes for pair in pair_files(path, other).pairs)


def pair_files(base, tuned, **options):
    return pair(open_checkpoint(base), open_checkpoint(tuned), **options)


class TestPrefixes:
    @pytest.mark.parametrize(
        ("base", "tuned"),
        [
            ("model.layers.0.mlp.up_proj.weight", "module.model.layers.0.mlp.up_proj.weight"),
            ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("_orig_mod.model.norm.weight", "model.norm.weight"),
            ("model.norm.weight", "base_model.model.model.norm.weight"),
            ("model.layers.0.self_attn.q_proj.weight", "model.language_model.layers.0.self_attn.q_proj.weight"),
            ("language_model.model.norm.weight", "model.language_model.norm.weight"),
            ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
            ("vision_model.post_layernorm.weight", "vision_tower.vision_model.post_layernorm.weight"),
            ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
            ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ],
    )
    def test_a_unique_match(self, base, tuned):
        for first, second in ((base, tuned), (tuned, base)):
            pairing = pair(checkpoint([first]), checkpoint([second]))
            assert names(pairing) == [(first, second)]
            assert (pairing.pairs[0].name, pairing.pairs[0].tuned_name) == (first, second)

    def test_an_exact_name_comes_first(self):
        pairing = pair(checkpoint(["w"]), checkpoint(["module.w", "w"]))
        assert names(pairing) == [("w", "w")]
        assert pairing.only_in_tuned == ("module.w",)
        assert pairing.warnings == ()

    @pytest.mark.parametrize(
        ("base", "tuned"), [(["w"], ["module.w", "model.w"]), (["a.w", "module.w", "model.w"], ["w"])]
    )
    def test_an_ambiguous_one_is_reported_not_guessed(self, base, tuned):
        pairing = pair(checkpoint([*base, "same"]), checkpoint([*tuned, "same"]))
        assert names(pairing) == [("same", "same")]
        assert (pairing.only_in_base, pairing.only_in_tuned) == (tuple(base), tuple(tuned))
        assert "module.w and model.w" in joined(pairing)

    def test_a_vision_layer_is_not_a_language_layer(self):
        pairing = pair(checkpoint(["layers.0.w", "a"]), checkpoint(["vision_tower.layers.0.w", "a"]))
        assert names(pairing) == [("a", "a")]
        assert pairing.warnings == ()


class TestRenames:
    def test_names_are_looked_up_after_renaming(self):
        pairing = pair(checkpoint(["h.1.w", "e"]), checkpoint(["layers.1.w", "e"]), renames=[r"^h\.=layers."])
        assert names(pairing) == [("h.1.w", "layers.1.w"), ("e", "e")]
        assert pairing.pairs[0].tuned_name == "layers.1.w"

    def test_a_rename_wins_over_an_exact_name(self):
        pairing = pair(checkpoint(["a"]), checkpoint(["a", "b"]), renames=["a=b"])
        assert names(pairing) == [("a", "b")]
        assert pairing.only_in_tuned == ("a",)

    def test_a_rename_wins_over_a_prefix(self):
        tuned = checkpoint(["module.w", "x.w"])
        assert names(pair(checkpoint(["w"]), tuned)) == [("w", "module.w")]
        pairing = pair(checkpoint(["w"]), tuned, renames=["^w=x.w"])
        assert names(pairing) == [("w", "x.w")]
        assert pairing.only_in_tuned == ("module.w",)

    def test_a_renamed_name_may_be_wrapped(self):
        pairing = pair(checkpoint(["h.1.w"]), checkpoint(["module.layers.1.w"]), renames=[r"^h\.=layers."])
        assert names(pairing) == [("h.1.w", "module.layers.1.w")]

    def test_a_rename_decides_what_is_ambiguous(self):
        pairing = pair(checkpoint(["w"]), checkpoint(["module.w", "model.w"]), renames=["^w$=model.w"])
        assert names(pairing) == [("w", "model.w")]

    def test_errors_and_warnings(self):
        with pytest.raises(OptionError):
            pair(checkpoint(["a"]), checkpoint(["a"]), renames=["("])
        with pytest.raises(OptionError, match="two tensors"):
            pair(checkpoint(["a", "b"]), checkpoint(["a"]), renames=["a=b"])
        assert "x=y" in joined(pair(checkpoint(["a"]), checkpoint(["a"]), renames=["x=y"]))


class TestMismatches:
    def test_a_padded_vocabulary(self):
        base = checkpoint({"e": ("BF16", (128256, 8)), "n": ("BF16", (8,))})
        tuned = checkpoint({"e": ("BF16", (128264, 8)), "n": ("BF16", (8,))})
        pairing = pair(base, tuned)
        (mismatch,) = pairing.mismatched
        assert (mismatch.name, mismatch.base, mismatch.tuned) == ("e", base.tensors["e"], tuned.tensors["e"])
        assert mismatch.reason == "shapes differ: [128256, 8] in base, [128264, 8] in tuned"
        assert names(pairing) == [("n", "n")]
        assert (pairing.only_in_base, pairing.only_in_tuned) == ((), ())

    @pytest.mark.parametrize(("base", "tuned"), [((), (1,)), ((2, 3), (3, 2)), ((0,), (0, 1)), ((4,), (2, 2))])
    def test_every_difference_of_shape(self, base, tuned):
        pairing = pair(
            checkpoint({"a": ("F32", base), "n": ("F32", ())}), checkpoint({"a": ("F32", tuned), "n": ("F32", ())})
        )
        assert [mismatch.name for mismatch in pairing.mismatched] == ["a"]

    @pytest.mark.parametrize(
        ("base", "tuned", "comparable"),
        [
            ("F32", "BF16", True), ("F16", "BF16", True), ("F8_E4M3", "BF16", True), ("F64", "F8_E5M2", True),
            ("I64", "I64", True), ("BOOL", "BOOL", True), ("F4", "F4", True), ("C64", "C64", True),
            ("I64", "I32", False), ("U8", "I8", False), ("BOOL", "U8", False), ("F32", "I32", False),
            ("I32", "F32", False), ("F8_E4M3", "F8_E4M3FNUZ", False), ("F8_E8M0", "F8_E4M3", False),
        ],
    )  # fmt: skip
    def test_dtypes(self, base, tuned, comparable):
        extra = {"n": ("F32", ())}
        pairing = pair(checkpoint({"a": (base, (4,)), **extra}), checkpoint({"a": (tuned, (4,)), **extra}))
        assert (("a", "a") in names(pairing)) == comparable
        reasons = [mismatch.reason for mismatch in pairing.mismatched]
        expected = [] if comparable else [f"dtypes cannot be compared: {base} in base, {tuned} in tuned"]
        assert reasons == expected


TIED = {"model.embed_tokens.weight": ("BF16", (10, 4)), "model.norm.weight": ("BF16", (4,))}
HEAD = {"lm_head.weight": ("BF16", (10, 4))}


def equal(first, second):
    return True


def different(first, second):
    return False


class TestTies:
    @pytest.mark.parametrize("side", ["base", "tuned"])
    def test_a_head_that_one_side_lacks(self, side):
        with_head, without = checkpoint({**TIED, **HEAD}), checkpoint(TIED)
        sides = (with_head, without) if side == "base" else (without, with_head)
        tied = pair(*sides, same_values=equal)
        assert tied.aliased == (Alias("lm_head.weight", "model.embed_tokens.weight", side, "values"),)
        assert (tied.only_in_base, tied.only_in_tuned, tied.warnings) == ((), (), ())
        for untied in (pair(*sides, same_values=different), pair(*sides)):
            assert untied.aliased == ()
            assert getattr(untied, f"only_in_{side}") == ("lm_head.weight",)
            assert untied.pairs == tied.pairs and len(tied.pairs) == 2

    def test_only_the_side_that_stores_it_is_asked(self):
        base, tuned = checkpoint(TIED, "base"), checkpoint({**TIED, **HEAD}, "tuned")

        def look(head, embedding):
            assert (head.name, embedding.name) == ("lm_head.weight", "model.embed_tokens.weight")
            assert head.shard.path == embedding.shard.path == "tuned"
            return True

        assert len(pair(base, tuned, same_values=look).aliased) == 1

    def test_heads_that_both_sides_store_are_compared(self):
        def look(head, embedding):
            raise AssertionError("there is nothing to ask")

        both = checkpoint({**TIED, **HEAD}), checkpoint({**TIED, **HEAD})
        assert len(pair(*both, same_values=look).pairs) == 3

    def test_nothing_is_read_where_nothing_can_be_compared(self):
        def look(head, embedding):
            raise AssertionError("data was read")

        with pytest.raises(PairingError):
            pair(checkpoint({"a": ("BF16", (2, 2))}), checkpoint({**TIED, **HEAD}), same_values=look)

    def test_names_are_those_of_the_side_that_stores_the_head(self):
        tuned = {
            "model.language_model.embed_tokens.weight": ("BF16", (10, 4)),
            "model.visual.norm.weight": ("BF16", (4,)),
            "language_model.lm_head.weight": ("BF16", (10, 4)),
        }
        pairing = pair(checkpoint(TIED), checkpoint(tuned), same_values=equal)
        of = "model.language_model.embed_tokens.weight"
        assert pairing.aliased == (Alias("language_model.lm_head.weight", of, "tuned", "values"),)
        assert names(pairing) == [("model.embed_tokens.weight", of)]

    def test_an_embedding_of_another_shape_is_no_place_for_a_head(self):
        pairing = pair(checkpoint(TIED), checkpoint({**TIED, "lm_head.weight": ("BF16", (12, 4))}), same_values=equal)
        assert (pairing.aliased, pairing.only_in_tuned) == ((), ("lm_head.weight",))

    @pytest.mark.parametrize("same", [equal, different])
    def test_heads_of_two_names_are_a_pair(self, same):
        # transformers gives GPT-NeoX's both.
        base, tuned = checkpoint({**TIED, "embed_out.weight": ("BF16", (10, 4))}), checkpoint({**TIED, **HEAD})
        pairing = pair(base, tuned, same_values=same)
        assert (pairing.only_in_base, pairing.only_in_tuned, pairing.aliased) == ((), (), ())
        assert names(pairing)[-1] == ("embed_out.weight", "lm_head.weight")

    def test_empty_tensors_share_no_bytes(self):
        empty = dict.fromkeys("abc", ("F32", (0, 4)))
        pairing = pair(checkpoint(empty), checkpoint(empty))
        assert len(pairing.pairs) == 3
        assert pairing.aliased == ()


class TestSelection:
    BASE = ("l.0.mlp.w", "l.0.attn.w", "l.1.mlp.w", "old")
    TUNED = ("l.0.mlp.w", "l.0.attn.w", "l.1.mlp.w", "new")

    def select(self, **options):
        return pair(checkpoint(self.BASE), checkpoint(self.TUNED), **options)

    def test_include(self):
        pairing = self.select(include=["*.mlp.*", "new"])
        assert names(pairing) == [("l.0.mlp.w", "l.0.mlp.w"), ("l.1.mlp.w", "l.1.mlp.w")]
        assert (pairing.only_in_base, pairing.only_in_tuned) == ((), ("new",))

    def test_exclude_wins(self):
        pairing = self.select(include=["l.0.*"], exclude=["*.attn.*"])
        assert names(pairing) == [("l.0.mlp.w", "l.0.mlp.w")]
        assert (pairing.only_in_base, pairing.only_in_tuned) == ((), ())

    def test_either_sides_name_counts(self):
        base, tuned = checkpoint(["w", "v"]), checkpoint(["module.w", "v"])
        assert names(pair(base, tuned, include=["module.*"])) == [("w", "module.w")]
        assert names(pair(base, tuned, exclude=["module.*"])) == [("v", "v")]

    def test_aliases_and_mismatches_are_selected_too(self):
        base = checkpoint({**TIED, "x": ("F32", (1,))})
        tuned = checkpoint({**TIED, **HEAD, "x": ("F32", (2,))})
        pairing = pair(base, tuned, exclude=["lm_head*", "x"], same_values=equal)
        assert (pairing.aliased, pairing.mismatched, pairing.warnings) == ((), (), ())
        assert len(pair(base, tuned).mismatched) == 1

    def test_a_head_is_not_tied_to_what_is_left_out(self):
        """Nothing would stand for its values."""
        base, tuned = checkpoint(TIED), checkpoint({**TIED, **HEAD})
        for options in ({"exclude": ["*embed_tokens*"]}, {"include": ["lm_head*", "*norm*"]}):
            pairing = pair(base, tuned, same_values=equal, **options)
            assert (pairing.aliased, pairing.only_in_tuned) == ((), ("lm_head.weight",))
            assert names(pairing) == [("model.norm.weight", "model.norm.weight")]

    def test_patterns_that_match_nothing(self):
        pairing = self.select(include=["l.*", "mlp"], exclude=["bias"])
        assert "--include mlp matches no tensor" in pairing.warnings
        assert "--exclude bias matches no tensor" in pairing.warnings

    @pytest.mark.parametrize("options", [{"include": ["mlp"]}, {"exclude": ["*"]}])
    def test_nothing_left(self, options):
        with pytest.raises(PairingError, match="leave no tensor to compare") as caught:
            self.select(**options)
        assert "l.0.mlp.w" in caught.value.expected

    def test_only_what_one_side_lacks_is_left(self):
        with pytest.raises(PairingError, match="in one of the two checkpoints only") as caught:
            self.select(include=["old"])
        assert caught.value.file and caught.value.found == "old"

    def test_only_what_cannot_be_compared_is_left(self):
        base, tuned = (
            checkpoint({"a": ("F32", (1,)), "b": ("F32", (1,))}),
            checkpoint({"a": ("F32", (1,)), "b": ("F32", (2,))}),
        )
        with pytest.raises(PairingError, match="can be compared") as caught:
            pair(base, tuned, include=["b"])
        assert caught.value.tensor == "b" and "shapes differ" in caught.value.found


class TestNothingToCompare:
    def test_names_of_both_sides_and_the_way_out(self):
        base, tuned = checkpoint([f"a.{n}" for n in range(9)], "B"), checkpoint([f"b.{n}" for n in range(2)], "T")
        with pytest.raises(PairingError, match="no tensor name in common") as caught:
            pair(base, tuned)
        error = caught.value
        assert error.file == "T"
        assert error.expected == "names as in B: a.0, a.1, a.2, ..."
        assert error.found == "b.0, b.1"
        assert "--map" in error.hint

    def test_no_tensors_at_all(self):
        with pytest.raises(PairingError, match="no tensor name in common"):
            pair(checkpoint([]), checkpoint([]))

    def test_only_mismatches(self):
        with pytest.raises(PairingError, match="no tensor of the two checkpoints can be compared") as caught:
            pair(checkpoint({"a": ("F32", (2,))}), checkpoint({"a": ("F32", (3,))}))
        assert caught.value.tensor == "a"
        assert "shapes differ" in caught.value.found


class TestScales:
    WEIGHT, SCALE = ("F8_E4M3", (4, 4)), ("F32", (1, 1))

    @pytest.mark.parametrize(
        "tensors",
        [
            {"m.q.weight": WEIGHT, "m.q.weight_scale_inv": SCALE},
            {"m.q.weight": WEIGHT, "m.q.weight_scale": SCALE},
            {"m.q.weight": WEIGHT, "m.q.weight.scale": SCALE},
            {"m.experts.up": WEIGHT, "m.experts.up_scale": SCALE, "m.k.weight": WEIGHT},
        ],
    )
    def test_one_warning_for_the_checkpoint(self, tensors):
        pairing = pair(checkpoint(tensors), checkpoint(tensors))
        assert pairing.warnings == ("1 fp8 tensor has scales beside it: compared as raw codes, unscaled",)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"m.q.weight": WEIGHT, "m.k.weight_scale": SCALE},
            {"m.q.weight": ("BF16", (4, 4)), "m.q.weight_scale": SCALE},
            {"m.q.weight": WEIGHT},
        ],
    )
    def test_no_warning_without_both(self, tensors):
        assert pair(checkpoint(tensors), checkpoint(tensors)).warnings == ()

    def test_one_side_is_enough(self):
        scaled = {"m.q.weight": self.WEIGHT, "m.q.weight_scale": self.SCALE}
        plain = {"m.q.weight": ("BF16", (4, 4))}
        assert "1 fp8" in joined(pair(checkpoint(plain), checkpoint(scaled)))
        assert "1 fp8" in joined(pair(checkpoint(scaled), checkpoint(plain)))


NAMES = st.lists(
    st.builds(
        lambda prefix, name: prefix + name,
        st.sampled_from(["", "model.", "module.", "visual.", "model.language_model."]),
        st.sampled_from(["embed_tokens.weight", "lm_head.weight", "layers.0.w", "layers.1.w", "norm.weight"]),
    ),
    unique=True,
)


@settings(max_examples=100, deadline=None)
@given(NAMES, NAMES)
def test_every_tensor_of_both_sides_is_in_one_place(base, tuned):
    try:
        pairing = pair(checkpoint(base), checkpoint(tuned))
    except PairingError:
        assert not set(base) & set(tuned)
        return
    places = [
        [pair.base.name for pair in pairing.pairs] + list(pairing.only_in_base),
        [pair.tuned.name for pair in pairing.pairs] + list(pairing.only_in_tuned),
    ]
    for alias in pairing.aliased:
        places[alias.side == "tuned"].append(alias.name)
    assert [sorted(place) for place in places] == [sorted(base), sorted(tuned)]
    assert {(name, name) for name in set(base) & set(tuned)} <= set(names(pairing))
