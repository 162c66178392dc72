"""How much of both sides was compared: every value is in a pair, an alias of one, or left out for a reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.figures.coverage import by_pattern
from ckptdiff.options import Options
from ckptdiff.run.planning import prepare

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().out

    return call


def write(file: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full(shape, 0.5, np.float16) for name, shape in shapes.items()}, file)
    return file


def experts(layers: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.mlp.experts.{k}.up_proj.weight": (8, 4) for i in range(layers) for k in range(4)}


shapes = st.dictionaries(
    st.sampled_from([f"{block}.{i}.w" for block in ("a", "b") for i in range(4)] + ["module.a.0.w"]),
    st.sampled_from([(2,), (3, 4), (4, 3), (5, 0)]),
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(base=shapes, tuned=shapes, exclude=st.sampled_from([(), ("b.*",), ("*.0.w",)]))
def test_every_value_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, base: Any, tuned: Any, exclude: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    base, tuned = {**base, "first": (7,)}, {**tuned, "first": (7,)}
    paths = [str(write(folder / f"{name}.safetensors", side)) for name, side in (("base", base), ("tuned", tuned))]
    diff = prepare(*paths, options=Options(exclude=exclude)).diff
    compared = sum(math.prod(facts.shape) for facts in diff.tensors)
    for side, held, facts in (("base", base, diff.base), ("tuned", tuned, diff.tuned)):
        found = diff.coverage[side]
        assert found.values == sum(math.prod(shape) for shape in held.values())
        assert found.compared == compared
        assert found.compared + sum(group["values"] for group in facts["left_out"]) == found.values
        assert len(diff.tensors) + sum(group["tensors"] for group in facts["left_out"]) == len(held)
        warned = any(f"less than half of {side} is compared" in warning for warning in diff.warnings)
        assert warned == (found.compared < found.values / 2)
        assert diff.base["tied"] == 0


def test_patterns_gather_names_that_differ_in_numbers() -> None:
    found = by_pattern([("a.1.b.2.w", 3, "x"), ("c1.w", 9, "x"), ("a.10.b.0.w", 4, "x"), ("a.1.b.2.w", 1, "y")])
    assert [tuple(group.values()) for group in found] == [
        ("c1.w", "x", 1, 9), ("a.*.b.*.w", "x", 2, 7), ("a.1.b.2.w", "y", 1, 1)]  # fmt: skip


def test_the_first_lines_say_what_was_compared_and_what_was_not(cli: Cli, tmp_path: Path) -> None:
    fused = {f"model.layers.{i}.mlp.bank.up_proj": (4, 8, 4) for i in range(2)}
    other = {"model.layers.0.mlp.down_proj.weight": (10, 4), "model.norm.weight": (4,)}
    base = write(tmp_path / "base.safetensors", {**other, **experts(2)})
    tuned = write(tmp_path / "tuned.safetensors", {**other, **fused, "model.layers.0.mlp.down_proj.weight": (12, 4)})
    run = tmp_path / "run.h5"
    code, text = cli("diff", base, tuned, "-o", run)
    assert code == 0
    assert text.splitlines()[:4] == [
        "compared 4 of 300 values of base, 4 of 308 of tuned",
        "only in base: model.layers.*.mlp.experts.*.up_proj.weight (8 tensors, 85.3 % of base)",
        "only in tuned: model.layers.*.mlp.bank.up_proj (2 tensors, 83.1 % of tuned)",
        "not compared: model.layers.0.mlp.down_proj.weight (1 tensor, 13.3 % of base, 15.6 % of tuned): "
        "shapes differ: [10, 4] in base, [12, 4] in tuned",
    ]
    assert "warning: less than half of base is compared: 1.3 % of its values" in text
    assert cli("show", run)[1].splitlines()[:5] == text.splitlines()[:5]
    for command in (("diff", base, tuned), ("show", run), ("diff", base, tuned, "--dry-run")):
        report = json.loads(cli(*command, "--format", "json")[1])
        assert report["coverage"] == {
            "base": {"values": 300, "compared": 4, "share": 4 / 300},
            "tuned": {"values": 308, "compared": 4, "share": 4 / 308},
        }
        assert len([line for line in report["warnings"] if "less than half" in line]) == 2
        if "--dry-run" not in command:
            assert [group["values"] for group in report["base"]["left_out"]] == [256, 40]
            assert cli(*command, "-q", "--fail-if", "coverage.base.share<1")[0] == 1
            assert cli(*command, "--fail-if", "coverage.tuned.compared<4")[0] == 0
    assert text.splitlines()[0] in cli("diff", base, tuned, "--dry-run")[1]


def test_what_the_user_leaves_out_is_counted(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", {**experts(1), "norm": (32,)})
    lines = cli("diff", path, path, "--exclude", "*.experts.*")[1].splitlines()
    assert lines[0] == "compared 32 of 160 values of base, 32 of 160 of tuned"
    assert lines[1] == "left out by --include and --exclude: 4 tensors, 80.0 % of base"
    assert "identical in what --include and --exclude leave" in "\n".join(lines)


@pytest.mark.parametrize("storing", ["base", "tuned"])
def test_a_tied_head_counts_as_compared(cli: Cli, tmp_path: Path, storing: str) -> None:
    model = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)}
    paths = {side: write(tmp_path / f"{side}.safetensors", model) for side in ("base", "tuned")}
    write(paths[storing], {**model, "lm_head.weight": (6, 4)})
    run = tmp_path / "run.h5"
    whole = {"base": 28, "tuned": 28, storing: 52}
    assert cli("diff", *paths.values(), "-o", run)[1].startswith(
        f"compared {whole['base']} of {whole['base']} values of base, {whole['tuned']} of tuned\n"
    )
    assert {side: found.compared for side, found in ckptdiff.RunFile(run).load().coverage.items()} == whole
    # Its word alone says nothing of values: without a look at them it does not count.
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    asked = prepare(*map(str, paths.values()), read_data=False).diff
    assert asked.coverage[storing].compared == 28


def first_release(run: Path, copy: Path) -> Path:
    """A run file without what 0.1.0 did not write of coverage."""
    shutil.copy(run, copy)
    with h5py.File(copy, "a") as file:
        provenance = json.loads(file["provenance"][()])
        for side in ("base", "tuned"):
            del file[f"tensors/compared_{side}"]
            for key in ("tied", "left_out", "uncompared"):
                del provenance[side][key]
        del file["provenance"]
        file["provenance"] = json.dumps(provenance)
    return copy


def test_run_files_of_the_first_release_tell_what_they_can(cli: Cli, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {**experts(1), "model.embed_tokens.weight": (6, 4)})
    tuned = write(tmp_path / "tuned.safetensors", {"model.embed_tokens.weight": (6, 4)})
    cli("diff", base, tuned, "-o", tmp_path / "new.h5")
    old = first_release(tmp_path / "new.h5", tmp_path / "old.h5")
    assert (
        cli("show", old)[1].splitlines()[:2]
        == [
            "compared 24 of 152 values of base, 24 of tuned",
            "only in base: model.layers.*.mlp.experts.*.up_proj.weight (4 tensors)",
        ]
        or "model.layers.*" in cli("show", old)[1]
    )
    assert ckptdiff.RunFile(old).load().coverage == ckptdiff.RunFile(tmp_path / "new.h5").load().coverage
    # Which side stores an alias is not in them.
    write(base, {"lm_head.weight": (6, 4), "model.embed_tokens.weight": (6, 4)})
    cli("diff", base, tuned, "-o", tmp_path / "tied.h5")
    old = first_release(tmp_path / "tied.h5", tmp_path / "old.h5")
    assert cli("show", old)[1].startswith("compared 24 values; of how many")
    report = json.loads(cli("show", old, "--format", "json")[1])
    assert report["coverage"]["base"] == {"values": 48, "compared": None, "share": None}
    assert cli("show", old, "--fail-if", "coverage.base.share<1")[0] == 2


@pytest.mark.parametrize("key", ["coverage", "coverage.base", "coverage.both.share", "coverage.base.left_out"])
def test_checks_of_what_coverage_lacks_are_refused(cli: Cli, tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "base.safetensors", {"w": (6, 4)})
    assert cli("diff", path, path, "--fail-if", f"{key}<1")[0] == 2


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8, bias=False), "lm_head": torch.nn.Linear(8, 4)})


@pytest.mark.parametrize("turned", [False, True])
def test_the_whole_state_of_a_peft_model_pairs_with_its_base(cli: Cli, tmp_path: Path, turned: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base, model = tiny(), peft.PeftModel(tiny(), config)
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    state["base_model.model.lm_head.modules_to_save.default.weight"] += 1
    save_torch(dict(base.state_dict()), tmp_path / "base.safetensors")
    save_torch(state, tmp_path / "peft.safetensors")
    paths = [tmp_path / "base.safetensors", tmp_path / "peft.safetensors"]
    if turned:
        paths.reverse()
    values, holding = sum(tensor.numel() for tensor in state.values()), "base" if turned else "tuned"
    text = cli("diff", *paths)[1]
    counts = (
        f"100 of {values} values of base, 100 of tuned" if turned else f"100 of 100 values of base, 100 of {values}"
    )
    assert text.startswith(f"compared {counts}")
    assert text.splitlines()[0].endswith(f"; the adapter in {holding} is not merged")
    assert "warning: " + str(tmp_path / "peft.safetensors") + " holds an adapter that is not merged" in text
    assert "merge_and_unload" in text
    report = json.loads(cli("diff", *paths, "--format", "json")[1])
    rows = {row["tuned_name" if not turned else "name"]: row["unchanged_bitwise"] for row in report["tensors"]}
    assert rows == {
        "base_model.model.q_proj.base_layer.weight": 1,
        "base_model.model.lm_head.modules_to_save.default.weight": 0,
        "base_model.model.lm_head.modules_to_save.default.bias": 1,
    }


EXPERTS = "model.layers.0.mlp.experts."


def split_experts(numbers: Iterable[int], prefix: str = "") -> dict[str, tuple[int, ...]]:
    parts = {"gate": (8, 4), "up": (8, 4), "down": (4, 8)}
    return {f"{prefix}{EXPERTS}{k}.{part}_proj.weight": shape for k in numbers for part, shape in parts.items()}


FUSED = {f"{EXPERTS}gate_up_proj": (4, 16, 4), f"{EXPERTS}down_proj": (4, 4, 8)}


def test_what_one_side_lacks_of_a_fused_tensor_makes_two_checkpoints_differ(cli: Cli, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", split_experts((0, 1, 3)))
    tuned = write(tmp_path / "tuned.safetensors", FUSED)
    run = tmp_path / "run.h5"
    assert cli("diff", base, tuned, "-o", run, "-q", "--exit-code")[0] == 1
    for command in (("diff", base, tuned), ("show", run)):
        text = cli(*command)[1]
        assert text.startswith("compared 288 of 288 values of base, 288 of 384 of tuned\n")
        assert "not identical: no compared value differs, but 2 tensors are compared in part" in text


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("globs", "compared", "turned_compared"),
    [
        ({"exclude": ("*down_proj*",)}, 256, 256),
        ({"exclude": ("*.experts.3.*",)}, 288, 0),
        ({"exclude": ("*.experts.down_proj",)}, 256, 256),
        ({"include": ("*.experts.0.gate_proj.*", "first")}, 32, 256),
    ],
)
def test_globs_on_pieces_count_each_value_once(
    globs: dict[str, tuple[str, ...]], compared: int, turned_compared: int, turned: bool, tmp_path: Path
) -> None:
    sides = [{**split_experts(range(4)), "first": (7,)}, {**FUSED, "first": (7,)}]
    paths = [str(write(tmp_path / f"{side}.safetensors", held)) for side, held in enumerate(sides)]
    diff = prepare(*(paths[::-1] if turned else paths), options=Options(**globs)).diff
    for side, facts in (("base", diff.base), ("tuned", diff.tuned)):
        found = diff.coverage[side]
        assert found.values == 391 and found.compared == 7 + (turned_compared if turned else compared)
        assert found.compared + sum(group["values"] for group in facts["left_out"]) == found.values
        assert {group["why"] for group in facts["left_out"]} == {"left out by --include and --exclude"}


@pytest.mark.parametrize("turned", [False, True])
def test_renamed_tensors_are_pieces_too(turned: bool, tmp_path: Path) -> None:
    sides = [split_experts(range(4), "policy."), FUSED]
    if turned:
        sides = [{f"policy.{name}": shape for name, shape in FUSED.items()}, split_experts(range(4))]
    paths = [str(write(tmp_path / f"{side}.safetensors", held)) for side, held in enumerate(sides)]
    diff = prepare(*paths, options=Options(renames=(r"^policy\.=",))).diff
    assert [found.share for found in diff.coverage.values()] == [1, 1]
    assert {facts.name for facts in diff.tensors} == sides[0].keys()


@pytest.mark.parametrize("empty", [{f"{EXPERTS}gate_up_proj": (0, 16, 4)}, {f"{EXPERTS}gate_up_proj": (4, 0, 4)}])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_without_values_have_no_pieces(empty: dict[str, tuple[int, ...]], turned: bool, tmp_path: Path) -> None:
    hollow = {f"{EXPERTS}{k}.{part}_proj.weight": (0, 4) for k in range(4) for part in ("gate", "up")}
    for other in (split_experts(range(4)), hollow):
        sides = [{**empty, "first": (7,)}, {**other, "first": (7,)}]
        paths = [str(write(tmp_path / f"{side}.safetensors", held)) for side, held in enumerate(sides)]
        diff = ckptdiff.diff(*(paths[::-1] if turned else paths))
        assert [facts.name for facts in diff.tensors] == ["first"] and not diff.identical
