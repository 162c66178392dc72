"""Pieces by the table of layouts: every form of the same weights against every other, and what does not add up."""

import assembled_values
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.layouts import assemble, orders_by_name, reopened
from ckptdiff.checkpoint.weights import Decoded

INSIDE = "model.layers.3."


def drawn(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype("f4")


def found(base, tuned, **options):
    return assemble(assembled_values.described(base), assembled_values.described(tuned), **options)


def of_experts(gate, up, down, names):
    return {
        f"{INSIDE}{name.format(expert)}": array
        for stack, name in zip((gate, up, down), names, strict=True)
        for expert, array in enumerate(stack)
    }


def swapped(array):
    return np.ascontiguousarray(array.swapaxes(1, 2))


def split(gate, up, down):
    return of_experts(gate, up, down, [f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")])


def mixtral(gate, up, down):
    return of_experts(gate, up, down, [f"block_sparse_moe.experts.{{}}.w{number}.weight" for number in (1, 3, 2)])


def fused(gate, up, down):
    gate_up = np.concatenate([gate, up], 1)
    return {f"{INSIDE}mlp.experts.gate_up_proj": gate_up, f"{INSIDE}mlp.experts.down_proj": down}


def llama4(gate, up, down):
    return {
        f"{INSIDE}feed_forward.experts.{name.rpartition('.')[2]}": swapped(array)
        for name, array in fused(gate, up, down).items()
    }


def inkling(gate, up, down):
    turns = np.stack([gate, up], 2).reshape(len(gate), -1, gate.shape[2])
    return {f"{INSIDE}mlp.experts.w13_weight": turns, f"{INSIDE}mlp.experts.w2_weight": down}


def granite(gate, up, down):
    gate_up = np.concatenate([gate, up], 1)
    return {
        f"{INSIDE}block_sparse_moe.input_linear.weight": gate_up,
        f"{INSIDE}block_sparse_moe.output_linear.weight": down,
    }


def step(gate, up, down):
    return {f"{INSIDE}moe.{part}_proj.weight": array for part, array in (("gate", gate), ("up", up), ("down", down))}


FORMS = [split, mixtral, fused, llama4, inkling, granite, step]
SIZES = st.integers(1, 6)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FORMS), st.sampled_from(FORMS), SIZES, SIZES, SIZES)
def test_every_form_of_experts_is_made_of_every_other(one, other, experts, inner, hidden):
    weights = drawn(experts, inner, hidden), drawn(experts, inner, hidden) + 9, drawn(experts, hidden, inner)
    base, tuned = one(*weights), other(*weights)
    assembly = found(base, tuned)
    if inner == hidden and step in (one, other):
        # Three square matrices, none of which tells that axes are not swapped.
        assert not assembly.assembled and all("shapes do not tell" in warning for warning in assembly.warnings)
    else:
        assert assembly.warnings == ()
        assembled_values.check(assembly, base, tuned)


@settings(deadline=None, max_examples=60)
@given(st.lists(SIZES, min_size=3, max_size=3), SIZES, st.booleans(), st.sampled_from(["qkv", "qkv_proj", "Wqkv"]))
def test_q_k_and_v_have_the_rows_that_they_have_one_by_one(rows, hidden, bias, name):
    shapes = [(count,) if bias else (count, hidden) for count in rows]
    leaf = "bias" if bias else "weight"
    letters = {
        f"{INSIDE}self_attn.{letter}_proj.{leaf}": drawn(*shape) for letter, shape in zip("qkv", shapes, strict=True)
    }
    whole = {f"module.{INSIDE}attn.{name}.{leaf}": np.concatenate(list(letters.values()))}
    for base, tuned in ((letters, whole), (whole, letters)):
        assembled_values.check(found(base, tuned), base, tuned)


def test_a_fused_tensor_is_one_contiguous_run_for_each_of_its_parts():
    gate, up = drawn(4, 3), drawn(4, 3)
    base = {"h.mlp.gate_proj.weight": gate, "h.mlp.up_proj.weight": up}
    assembly = found(base, {"h.mlp.gate_up_proj.weight": np.concatenate([gate, up])})
    (piece,) = assembly.assembled["h.mlp.up_proj.weight"].pieces
    assert (piece.base_index, piece.tuned_index) == (((0, 4, 1), (0, 3, 1)), ((4, 8, 1), (0, 3, 1)))
    assert assembly.rules["h.mlp.up_proj.weight"] == "up_proj = gate_up_proj"


def test_fused_tensors_of_other_names_are_not_cut():
    array = drawn(10, 4)  # 10 rows: q and two heads of k and v, but nothing tells where they end
    assembly = found({"blocks.0.attn.qkv.weight": array}, {"layers.0.self_attn.qkv_proj.weight": array})
    assert assembly.renamed == {"blocks.0.attn.qkv.weight": "layers.0.self_attn.qkv_proj.weight"}


def test_names_of_an_assembled_tensor_say_what_its_pieces_share():
    weights = drawn(12, 2, 3), drawn(12, 2, 3), drawn(12, 3, 2)
    assembly = found(fused(*weights), split(*weights))
    gate_up, down = assembly.assembled.values()
    assert gate_up.name == f"{INSIDE}mlp.experts.*.*_proj.weight"
    assert down.name == f"{INSIDE}mlp.experts.*.down_proj.weight"
    assert (gate_up.shape, gate_up.dtype, len(gate_up.pieces)) == ((12, 4, 3), "F32", 24)


def test_a_decoded_weight_is_a_source_like_any_other():
    weights = drawn(2, 3, 4), drawn(2, 3, 4), drawn(2, 4, 3)
    tuned = {
        name: Decoded(name, "FP8", codes.shape, codes, (codes,), "e4m3", codes, (1, 1))
        for name, codes in assembled_values.described(fused(*weights)).items()
    }
    assembly = assemble(assembled_values.described(split(*weights)), tuned)
    assert all(isinstance(one.pieces[0].source, Decoded) for one in assembly.assembled.values())
    assert {one.dtype for one in assembly.assembled.values()} == {"F32"} and assembly.used == tuned.keys()


def test_grids_of_scales_lie_as_their_weights_do():
    gate, up = drawn(3, 2, 4), drawn(3, 2, 4)
    base = {f"{INSIDE}mlp.experts.gate_up_proj_scale_inv": np.concatenate([gate, up], 1)}
    tuned = {
        f"{INSIDE}mlp.experts.{expert}.{part}_proj.weight_scale_inv": array
        for part, stack in (("gate", gate), ("up", up))
        for expert, array in enumerate(stack)
    }
    # A grid of 4 rows in all and 4 columns could be either way; the weights tell.
    gate, up, down = drawn(3, 200, 500), drawn(3, 200, 500), drawn(3, 500, 200)
    assert "shapes do not tell" in found(base, tuned).warnings[0]
    base, tuned = base | fused(gate, up, down), tuned | split(gate, up, down)
    assembled_values.check(found(base, tuned), base, tuned)


@pytest.mark.parametrize(("one", "other"), [(split, fused), (fused, split), (fused, llama4), (split, llama4)])
def test_gate_and_up_in_another_order_can_be_looked_at(one, other):
    gate, up, down = drawn(3, 4, 5), drawn(3, 4, 5) + 9, drawn(3, 5, 4)
    base, tuned = one(gate, up, down), other(up, gate, down)
    check_orders(base, tuned, "swapped in tuned")
    # One of the two that is fused, with gate and up in turns.
    turned = fused(gate, up, down) | {
        f"{INSIDE}mlp.experts.gate_up_proj": inkling(gate, up, down)[f"{INSIDE}mlp.experts.w13_weight"]
    }
    if one is split:
        check_orders(one(gate, up, down), turned, "in turns in tuned")
    elif other is split:
        check_orders(turned, other(gate, up, down), "in turns in base")


def check_orders(base, tuned, said):
    assembly = found(base, tuned)
    assert len(assembly.orders) == len({rule for name, rule in assembly.rules.items() if "down" not in name})
    for name, orders in assembly.orders.items():
        np.testing.assert_array_equal(assembled_values.assembled_values(dict(orders)[said], tuned), base[name])


def test_pairs_by_name_can_be_looked_at_in_another_order():
    gate, up, down = drawn(3, 4, 5), drawn(3, 4, 5) + 9, drawn(3, 5, 4)
    for form in (fused, llama4):
        base, tuned = form(gate, up, down), form(up, gate, down)
        sides = [assembled_values.described(side) for side in (base, tuned)]
        ((name, orders),) = orders_by_name((sides[0][name], sides[1][name]) for name in base).items()
        assert name.endswith("gate_up_proj")
        values = [
            assembled_values.assembled_values(order, tuned) for said, order in orders if said.startswith("swapped")
        ]
        assert any(np.array_equal(one, base[name]) for one in values)


def weights(experts=3):
    return drawn(experts, 2, 5), drawn(experts, 2, 5) + 9, drawn(experts, 5, 2)


def without(tensors, name):
    return {key: array for key, array in tensors.items() if not key.endswith(name)}


def test_a_missing_expert_is_named_and_the_rest_compared():
    assembly = found(fused(*weights()), without(split(*weights()), "1.up_proj.weight"))
    assert assembly.assembled.keys() == fused(*weights()).keys()
    assert assembly.warnings == (
        f"1 tensor of base in part only, as tuned has no up of expert 1: {INSIDE}mlp.experts.gate_up_proj",
    )


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FORMS), st.sampled_from([split, mixtral]), SIZES, SIZES, SIZES, st.data())
def test_pieces_that_are_there_are_compared(form, single, experts, inner, hidden, data):
    """Experts that lack a tensor, or have one of another shape: each value that has a counterpart meets it."""
    whole = drawn(experts, inner, hidden), drawn(experts, inner, hidden) + 9, drawn(experts, hidden, inner)
    # The tuned side's tensor of each part and expert is the part's own array of them.
    names = list(single(*(np.arange(experts),) * 3))
    gone = data.draw(st.sets(st.sampled_from(names)))
    bent = data.draw(st.sets(st.sampled_from(names))) - gone
    tuned = single(*whole)
    known = [array.copy() for array in whole]
    for name in gone | bent:
        known[names.index(name) // experts][names.index(name) % experts] = np.nan
    tuned |= {name: drawn(*tuned[name].shape[:-1], 9) for name in bent}
    tuned = {name: array for name, array in tuned.items() if name not in gone}
    base, expected = form(*whole), form(*known)
    assembly = found(base, tuned)
    if any("shapes do not tell" in warning for warning in assembly.warnings):
        assert hidden in (inner, 2 * inner)
        return
    for name, values in expected.items():
        if name in assembly.renamed:
            np.testing.assert_array_equal(tuned[assembly.renamed[name]], values)
        elif name in assembly.assembled:
            there = assembled_values.assembled_values(assembly.assembled[name], tuned, in_part=True)
            np.testing.assert_array_equal(there, values)
            assert assembly.assembled[name].whole or any("in part only" in warning for warning in assembly.warnings)
        else:
            assert np.isnan(values).all()
    assert assembly.used == tuned.keys() - bent and not assembly.partly


def test_values_that_base_lacks_are_named():
    assembly = found(without(split(*weights()), "2.down_proj.weight"), fused(*weights()))
    assert len(assembly.assembled) == 8
    assert assembly.partly == {f"{INSIDE}mlp.experts.down_proj": 10}
    assert assembly.used == {f"{INSIDE}mlp.experts.gate_up_proj"}
    assert assembly.warnings == (f"1 tensor of tuned with 10 values that base lacks: {INSIDE}mlp.experts.down_proj",)


def test_a_missing_half_is_known_by_the_other():
    gate, up = drawn(4, 3), drawn(4, 3)
    whole = {"h.mlp.gate_up_proj.weight": np.concatenate([gate, up])}
    assembly = found({"h.mlp.up_proj.weight": up}, whole)
    assembled = assembly.assembled["h.mlp.up_proj.weight"]
    np.testing.assert_array_equal(assembled_values.assembled_values(assembled, whole), up)
    assembly = found(whole, {"h.mlp.up_proj.weight": up})
    assert assembly.warnings == ("1 tensor of base in part only, as tuned has no gate: h.mlp.gate_up_proj.weight",)
    (piece,) = assembly.assembled["h.mlp.gate_up_proj.weight"].pieces
    assert piece.base_index == ((4, 8, 1), (0, 3, 1))


@pytest.mark.parametrize("rows", [(6, 2, 2), (4, 4, 4), (5, 2, 4)])
@pytest.mark.parametrize("there", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("name", ["qkv_proj", "in_proj_", "c_attn"])
def test_q_k_and_v_that_are_there_are_compared(name, there, rows):
    """Which rows are those of a lone k is known only where all three are alike."""
    parts = {letter: drawn(count, 7) + place for place, (letter, count) in enumerate(zip("qkv", rows, strict=True))}
    tuned = {f"{INSIDE}self_attn.{letter}_proj.weight": parts[letter] for letter in there}
    known = [parts[letter] if letter in there else np.full_like(parts[letter], np.nan) for letter in "qkv"]
    base = f"{INSIDE}self_attn.{name}weight" if name.endswith("_") else f"{INSIDE}self_attn.{name}.weight"
    whole, expected = np.concatenate(list(parts.values())), np.concatenate(known)
    if name == "c_attn":
        whole, expected = np.ascontiguousarray(whole.T), expected.T
    assembly = found({base: whole}, tuned)
    if there == "k" and rows != (4, 4, 4):
        assert not assembly.assembled and "nothing tells where parts" in assembly.warnings[0]
        return
    there = assembled_values.assembled_values(assembly.assembled[base], tuned, in_part=True)
    np.testing.assert_array_equal(there, expected)
    assert assembly.used == tuned.keys()
    # The other way round nothing is missing: the tuned side has more.
    again = found(tuned, {base: whole})
    assert again.partly == {base: int(np.isnan(expected).sum())} and again.assembled.keys() == tuned.keys()


@pytest.mark.parametrize(
    ("base", "tuned", "reason"),
    [
        pytest.param(
            {"a.attn.qkv.weight": (10, 4)}, {f"a.attn.{one}_proj.weight": (4, 4) for one in "qkv"},
            "a.attn.qkv.weight has 10 rows, its parts 4 and 4 and 4", id="rows that do not add up"),
        pytest.param(
            {"a.attn.qkv.weight": (12, 4)}, {"a.attn.gqkv_proj.weight": (16, 4)},
            "nothing tells where parts of a.attn.qkv.weight end", id="two fused tensors of other parts"),
        pytest.param(
            {"a.mlp.experts.down_proj": (2**40, 0, 4)}, {"a.mlp.experts.0.down_proj.weight": (0, 4)},
            "it holds no values", id="more experts than there is memory for"),
        pytest.param(
            {"a.mlp.gate_up_proj.weight": (7, 4)}, {f"a.mlp.{one}_proj.weight": (3, 4) for one in ("gate", "up")},
            "a.mlp.gate_up_proj.weight has 7 rows, which are not 2 equal parts", id="an odd number of rows"),
        pytest.param(
            {"a.mlp.gate_up_proj.weight": (8, 4)}, {f"a.mlp.{one}_proj.weight": (4, 3) for one in ("gate", "up")},
            "no gate of tuned has shape (4, 4)", id="other columns"),
        pytest.param(
            {"a.mlp.experts.5.down_proj.weight": (4, 3)}, {"a.mlp.experts.down_proj": (2, 4, 3)},
            "tuned has 2 experts in one tensor", id="an expert too many"),
        pytest.param(
            {f"a.mlp.experts.{one}.down_proj.weight": (4, 4) for one in range(2)},
            {"a.mlp.experts.down_proj": (2, 4, 4)},
            "shapes do not tell whether axes are swapped", id="square, and nothing beside it"),
        pytest.param(
            {"a.attn.wqkv.weight": (12, 4)}, {f"a.attn.{one}_proj.weight": (4, 4) for one in "qkv"},
            "rows of q and k may be permuted on one side for rotary embeddings", id="permuted rows"),
        pytest.param(
            {"a.mlp.gate_up_proj.weight": (8, 4)},
            {"a.mlp.gate_proj.weight": (4, 4), "a.mlp.up_proj.weight": (4, 4), "a.mlp.w1.weight": (4, 4)},
            "tuned stores their gate twice, such as in a.mlp.gate_proj.weight and a.mlp.w1.weight", id="both layouts"),
        pytest.param(
            {"a.mlp.experts.down_proj": (2, 4, 3)},
            {f"a.mlp.experts.{one}.down_proj.weight": (4, 2 + 3 * one) for one in range(2)},
            "no down of tuned has shape (4, 3)", id="no expert of that shape"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_named(base, tuned, reason):
    sides = [
        {name: TensorInfo(name, "F32", shape, assembled_values.SHARD, 0, 0) for name, shape in side.items()}
        for side in (base, tuned)
    ]
    assembly = assemble(*sides)
    assert any(f"left out, as {reason}: a." in warning for warning in assembly.warnings), assembly.warnings
    assert not assembly.assembled.keys() & base.keys()


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        (("BF16", "I8"), "dtypes cannot be compared: BF16 in base, I8 in tuned"),
        (("I16", "I8"), "dtypes cannot be compared: I16 in base, I8 in tuned"),
        (("F4", "F4"), "values of F4 share bytes"),
        (("BF16", "F32"), None),
        (("I8", "I8"), None),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_pieces_have_comparable_dtypes(dtypes, reason, turned):
    one, other = (
        {name: TensorInfo(name, dtype, array.shape, assembled_values.SHARD, 0, 0) for name, array in side.items()}
        for side, dtype in zip((split(*weights()), fused(*weights())), dtypes, strict=True)
    )
    assembly = assemble(other, one) if turned else assemble(one, other)
    if reason is None:
        assert assembly.assembled.keys() == (other if turned else one).keys() and not assembly.warnings
        return
    if turned and "in base" in reason:
        reason = f"dtypes cannot be compared: {dtypes[1]} in base, {dtypes[0]} in tuned"
    assert not assembly.assembled and any(f"left out, as {reason}" in warning for warning in assembly.warnings)


def test_one_expert_of_another_shape_leaves_the_others():
    base = split(*weights()) | {f"{INSIDE}mlp.experts.1.gate_proj.weight": drawn(2, 4)}
    assembly = found(base, fused(*weights()))
    assert len(assembly.assembled) == 8 and assembly.partly == {f"{INSIDE}mlp.experts.gate_up_proj": 10}
    assert any("1.gate_proj.weight has shape (2, 4), where (2, 5) is right" in text for text in assembly.warnings)


@pytest.mark.parametrize("experts", [(2, 3), (3, 2)])
def test_experts_that_both_sides_have_are_compared(experts):
    """Stacks of gate and up against stacks of both, of which one side has more."""
    whole = weights()
    sides = [[array[:count] for array in whole] for count in experts]
    base, tuned = fused(*sides[0]), step(*sides[1])
    assembly = found(base, tuned)
    for name, array in base.items():
        there = assembled_values.assembled_values(assembly.assembled[name], tuned, in_part=True)
        np.testing.assert_array_equal(there[:2], array[:2])
        assert np.isnan(there[2:]).all()
    if experts == (2, 3):
        assert assembly.partly == dict.fromkeys(tuned, 10)
    else:
        assert assembly.warnings[0].startswith("2 tensors of base in part only, as tuned has 2 experts, base 3: ")


def test_an_expert_of_another_shape_in_tuned_leaves_the_others():
    tuned = split(*weights()) | {f"{INSIDE}mlp.experts.1.gate_proj.weight": drawn(2, 4)}
    assembly = found(fused(*weights()), tuned)
    pieces = assembly.assembled[f"{INSIDE}mlp.experts.gate_up_proj"].pieces
    assert {piece.source.name for piece in pieces} == {
        name for name in tuned if "down" not in name and "1.gate" not in name
    }
    assert "in part only, as" in assembly.warnings[0]
    assert "1.gate_proj.weight has shape (2, 4), where (2, 5) is right" in assembly.warnings[0]


def test_parts_of_two_dtypes_are_named():
    tuned = split(*weights())
    tuned[f"{INSIDE}mlp.experts.2.up_proj.weight"] = tuned[f"{INSIDE}mlp.experts.2.up_proj.weight"].astype("f2")
    assembly = found(fused(*weights()), tuned)
    assert assembly.assembled.keys() == {f"{INSIDE}mlp.experts.down_proj"}
    assert "left out, as their pieces differ in dtype, F16 and F32" in assembly.warnings[0]


def test_both_layouts_in_one_checkpoint_are_said():
    assembly = found(split(*weights()), fused(*weights()) | mixtral(*weights()))
    assert not assembly.assembled and not assembly.renamed and not assembly.used
    assert all("left out, as tuned stores their" in warning for warning in assembly.warnings)
    assert sum(int(warning.split()[0]) for warning in assembly.warnings) == 9


def test_biases_of_experts_tell_that_gate_and_up_take_turns():
    base = {f"{INSIDE}mlp.experts.gate_up_proj": drawn(2, 3, 8), f"{INSIDE}mlp.experts.gate_up_proj_bias": drawn(2, 8)}
    tuned = {
        f"{INSIDE}mlp.experts.{expert}.{part}_proj.{leaf}": np.ascontiguousarray(array[expert][..., start::2].T)
        for part, start in (("gate", 0), ("up", 1))
        for expert in range(2)
        for leaf, array in zip(("weight", "bias"), base.values(), strict=True)
    }
    for one, other in ((base, tuned), (tuned, base)):
        assembly = found(one, other)
        assembled_values.check(assembly, one, other)
        assert "taken with gate and up in turns, as in GPT-OSS" in assembly.warnings[0]


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.language_model.layers.0.mlp.router.weight"),
        ("backbone.layers.1.mixer.A_log", "model.layers.1.mixer.A_log"),
        ("embed_out.weight", "lm_head.weight"),
        ("vit.encoder.layer.0.attention.output.dense.weight", "vit.layers.0.attention.o_proj.weight"),
        ("encoder.layer.0.intermediate.dense.bias", "layers.0.mlp.fc1.bias"),
    ],
)
def test_other_names_of_one_tensor(base, tuned):
    array = drawn(4, 3)
    assert found({base: array}, {tuned: array}).renamed == {base: tuned}
    assert found({tuned: array}, {base: array}).renamed == {tuned: base}


def test_another_name_with_another_shape_is_another_tensor():
    assembly = found({"a.encoder.layer.0.output.dense.weight": drawn(3, 4)}, {"a.layers.0.mlp.fc2.weight": drawn(3, 5)})
    assert not assembly.renamed and not assembly.used
    assert "left out, as it has another shape under its other name: a.enc" in assembly.warnings[0]
    heads = found({"embed_out.weight": drawn(9, 4)}, {"lm_head.weight": drawn(8, 4)})
    assert heads.renamed == {"embed_out.weight": "lm_head.weight"}


def test_two_tensors_of_one_name_are_said():
    array = drawn(3)
    base = {"a.layers.0.norm1.weight": array, "a.layers.0.ln_1.weight": array}
    assembly = found(base, {"a.layers.0.input_layernorm.weight": array})
    assert not assembly.renamed
    assert (
        "2 tensors of base left out, as more than one could be a.layers.0.input_layernorm.weight"
        in assembly.warnings[0]
    )


@pytest.mark.parametrize(
    "name",
    ["", "*", "a.*.mlp.gate_proj.weight", "..", "0", "experts.0", "q_proj", ".weight", "a\n.b", "9" * 5000 + ".q"],
)
def test_odd_names_are_no_more_than_names(name):
    assembly = found({name: drawn(2, 2)}, {"b.other": drawn(2, 2)})
    assert not assembly.renamed and not assembly.assembled and not assembly.warnings


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)])
def test_shapes_without_a_meaning_are_left_out(shape):
    base, tuned = {"a.mlp.gate_up_proj.weight": drawn(*shape)}, {"a.mlp.gate_proj.weight": drawn(*shape)}
    for one, other in ((base, tuned), (tuned, base)):
        assert not found(one, other).used


def test_pairs_by_name_are_looked_at_again_where_axes_are_swapped():
    gate_up, down = drawn(2, 8, 4), drawn(2, 4, 4)
    base = {"a.mlp.experts.gate_up_proj": gate_up, "a.mlp.experts.down_proj": down, "b.mlp.experts.down_proj": down}
    tuned = dict(base, **{"a.mlp.experts.gate_up_proj": swapped(gate_up), "a.mlp.experts.down_proj": swapped(down)})
    sides = [assembled_values.described(side) for side in (base, tuned)]
    again = reopened([(sides[0][name], sides[1][name]) for name in base])
    assert again == {"a.mlp.experts.gate_up_proj", "a.mlp.experts.down_proj"}
    left = [{name: side[name] for name in again} for side in (base, tuned)]
    assembled_values.check(found(*left), *left)


def test_other_shapes_of_one_name_are_no_other_layout():
    sides = [assembled_values.described({"a.mlp.experts.down_proj": drawn(*shape)}) for shape in ((2, 4, 3), (3, 4, 3))]
    assert reopened([tuple(side["a.mlp.experts.down_proj"] for side in sides)]) == frozenset()
