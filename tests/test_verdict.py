"""What is called identical, and exits with 0: two sides of which every value is accounted for."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.cli import main

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.mlp.up_proj.weight"
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
Tensors = Mapping[str, np.ndarray]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)


MODEL = {EMBEDDING: values(0, 12, 8), LAYER: values(1, 6, 8)}
TIED = {**MODEL, HEAD: MODEL[EMBEDDING]}
UNTIED = {**MODEL, HEAD: values(2, 12, 8)}


def write(folder: Path, tensors: Tensors, config: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: array.copy() for name, array in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def one_changed(array: np.ndarray, place: int = -1) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[place] = 77
    return changed


class Verdict(NamedTuple):
    identical: bool
    line: str
    only_in_base: list[str]
    only_in_tuned: list[str]
    aliased: dict[str, str]
    warnings: str


def verdict(cli: Cli, base: Path, tuned: Path, *options: str) -> Verdict:
    """What every way to ask says, which has to be the same."""
    run = base.parent / "run.h5"
    code, out, err = cli("diff", base, tuned, "-q", "-o", run, *options)
    assert code in (0, 1) and (out, err) == ("", ""), err
    said = []
    for again in (("diff", base, tuned, *options), ("show", run)):
        found, text, _ = cli(*again, "--exit-code")
        assert found == code
        lines = [line for line in text.splitlines() if line.startswith(("identical", "not identical"))]
        found, text, _ = cli(*again, "--format", "json", "--fail-if", "counts.only_in_base>0")
        report = json.loads(text)
        assert found == bool(report["only_in_base"]), "without --exit-code, only the checks count"
        aliased = {alias["name"]: alias["of"] for alias in report["aliased"]}
        lists, warnings = (report["only_in_base"], report["only_in_tuned"]), "\n".join(report["warnings"])
        said.append(Verdict(code == 0, "\n".join(lines), *lists, aliased, warnings))
    assert said[0] == said[1] and said[0].line.startswith("identical") == said[0].identical
    return said[0]


@pytest.mark.parametrize("config", [None, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("storing", ["base", "tuned"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_one_side_lacks(cli: Cli, tmp_path: Path, equal: bool, storing: str, config: Any) -> None:
    """Its values decide, whatever either configuration says."""
    lacking = "tuned" if storing == "base" else "base"
    write(tmp_path / storing, TIED if equal else UNTIED, config)
    write(tmp_path / lacking, MODEL, config)
    found = verdict(cli, tmp_path / "base", tmp_path / "tuned")
    assert found.identical == equal
    assert found.aliased == ({HEAD: EMBEDDING} if equal else {})
    lists = {"base": found.only_in_base, "tuned": found.only_in_tuned}
    # Where the other side ties its own, the head is compared with the embedding that it has left.
    untied = not equal and config == {"tie_word_embeddings": True}
    assert lists == {storing: [] if equal or untied else [HEAD], lacking: []}
    if untied:
        assert found.line == ""
    elif not equal:
        assert found.line == f"not identical: no compared value differs, but 1 tensor is only in {storing}"
    contradicted = not equal and config == {"tie_word_embeddings": True}
    assert ("tied by its config.json, and differs" in found.warnings) == contradicted


@pytest.mark.parametrize("place", [0, -1])
def test_one_value_makes_a_head_another_tensor(cli: Cli, tmp_path: Path, place: int) -> None:
    base = write(tmp_path / "base", {**MODEL, HEAD: one_changed(MODEL[EMBEDDING], place)})
    found = verdict(cli, base, write(tmp_path / "tuned", MODEL))
    assert (found.identical, found.only_in_base) == (False, [HEAD])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_dtypes_of_head_and_embedding_may_differ(cli: Cli, tmp_path: Path, dtype: type) -> None:
    model = {**MODEL, EMBEDDING: np.arange(96).reshape(12, 8).astype(ml_dtypes.bfloat16)}
    model[EMBEDDING][0, :2] = np.nan, 0
    head = model[EMBEDDING].astype(dtype)
    head[0, 1] = -0.0
    tuned = write(tmp_path / "tuned", model)
    assert verdict(cli, write(tmp_path / "base", {**model, HEAD: head}), tuned).identical
    head[-1, -1] *= 2
    assert not verdict(cli, write(tmp_path / "base", {**model, HEAD: head}), tuned).identical


def test_an_equal_head_of_embeddings_that_differ(cli: Cli, tmp_path: Path) -> None:
    moved = one_changed(MODEL[EMBEDDING])
    tuned = write(tmp_path / "tuned", {**MODEL, EMBEDDING: moved, HEAD: moved})
    found = verdict(cli, write(tmp_path / "base", MODEL), tuned)
    assert (found.identical, found.aliased, found.line) == (False, {HEAD: EMBEDDING}, "")


def test_embeddings_of_t5(cli: Cli, tmp_path: Path) -> None:
    shared, rest = values(0, 12, 8), {"encoder.block.0.layer.0.SelfAttention.q.weight": values(1, 8, 8)}
    lean, full = {T5[0]: shared, **rest}, {**dict.fromkeys(T5, shared), **rest}
    base = write(tmp_path / "base", lean)
    found = verdict(cli, base, write(tmp_path / "tuned", full))
    assert found.identical and found.aliased == dict.fromkeys(T5[1:], T5[0])
    for other in T5[1:]:
        found = verdict(cli, base, write(tmp_path / "tuned", {**full, other: one_changed(shared)}))
        assert (found.identical, found.only_in_tuned) == (False, [other])
        assert found.aliased == {name: T5[0] for name in T5[1:] if name != other}
    # Without the shared one, an equal pair has one tensor that the other side lacks.
    two = {name: array for name, array in full.items() if name != T5[0]}
    found = verdict(cli, write(tmp_path / "base", {**rest, T5[1]: shared}), write(tmp_path / "tuned", two))
    assert found.identical and found.aliased == {T5[2]: T5[1], HEAD: T5[1]}
    found = verdict(cli, write(tmp_path / "base", rest), write(tmp_path / "tuned", two))
    assert not found.identical and len(found.only_in_tuned) == 1 and len(found.aliased) == 2


def test_one_of_several_embeddings_of_a_shape(cli: Cli, tmp_path: Path) -> None:
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    model = {name: values(number, 12, 8) for number, name in enumerate(names)}
    base = write(tmp_path / "base", model)
    for name in names:
        found = verdict(cli, base, write(tmp_path / "tuned", {**model, HEAD: model[name]}))
        assert found.identical and found.aliased == {HEAD: name}
    assert not verdict(cli, base, write(tmp_path / "tuned", {**model, HEAD: values(9, 12, 8)})).identical


@pytest.mark.parametrize("said", [True, False])
def test_where_values_cannot_be_known_the_configuration_speaks(cli: Cli, tmp_path: Path, said: bool) -> None:
    """Codes of fp8 are no values without their scales; what is tied by word alone is not compared."""
    model = {**MODEL, EMBEDDING: MODEL[EMBEDDING].astype(ml_dtypes.float8_e4m3fn)}
    model["model.embed_tokens.weight_scale"] = np.ones((1, 1), np.float32)
    base = write(tmp_path / "base", {**model, HEAD: MODEL[EMBEDDING]}, {"text_config": {"tie_word_embeddings": said}})
    found = verdict(cli, base, write(tmp_path / "tuned", model))
    assert not found.identical
    assert (found.aliased, found.only_in_base) == (({HEAD: EMBEDDING}, []) if said else ({}, [HEAD]))
    if said:
        assert found.line == "not identical: no compared value differs, but weights of base were not compared"
        assert "not by its values" in found.warnings


def test_a_dry_run_reads_no_head(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write(tmp_path / "base", MODEL), write(tmp_path / "tuned", TIED)

    def no_reads(*arguments: object) -> int:
        raise AssertionError("data was read")

    monkeypatch.setattr(os, "preadv", no_reads)
    code, out, _ = cli("diff", base, tuned, "--dry-run", "--device", "cpu")
    assert code == 0 and "1 only in tuned" in out and "0 aliased" in out
    assert f"warning: {HEAD} is stored only in tuned: to tell whether it equals {EMBEDDING}, data has to be read" in out
    (tuned / "config.json").write_text('{"tie_word_embeddings": true}')
    plan = json.loads(cli("diff", base, tuned, "--dry-run", "--device", "cpu", "--format", "json").out)
    assert plan["counts"]["aliased"] == 1 and plan["counts"]["only_in_tuned"] == 0
    assert "by its config.json, not by its values" in plan["warnings"][0]


def test_a_head_that_cannot_be_read_is_an_error(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write(tmp_path / "base", MODEL), write(tmp_path / "tuned", TIED)

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    code, out, err = cli("diff", base, tuned, "-o", tmp_path / "run.h5")
    assert (code, out) == (2, "") and not (tmp_path / "run.h5").exists()
    assert str(tuned / "model.safetensors") in err and HEAD in err and "cannot read the shard" in err


def test_weights_of_subfolders(cli: Cli, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", MODEL), write(tmp_path / "tuned", MODEL)
    assert verdict(cli, base, tuned).identical
    write(tuned / "2_Dense", {"linear.weight": values(3, 8, 8)})
    found = verdict(cli, base, tuned)
    assert found.line == "not identical: no compared value differs, but weights of tuned were not compared"
    assert "2_Dense/model.safetensors" in found.warnings
    write(base / "2_Dense", {"linear.weight": values(4, 8, 8)})
    found = verdict(cli, base, tuned)
    assert found.line == "not identical: no compared value differs, but weights of base and tuned were not compared"
    for side in (base, tuned):
        assert f"{side} has weights in its subfolders that are not read: 2_Dense/model" in found.warnings
    assert verdict(cli, base / "model.safetensors", tuned / "model.safetensors").identical
    assert not verdict(cli, base / "2_Dense", tuned / "2_Dense").identical


def test_shards_that_an_index_leaves_out(cli: Cli, tmp_path: Path) -> None:
    for side in ("base", "tuned"):
        write(tmp_path / side, MODEL)
        index = {"weight_map": dict.fromkeys(MODEL, "model.safetensors")}
        (tmp_path / side / "model.safetensors.index.json").write_text(json.dumps(index))
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert verdict(cli, base, tuned).identical
    save_file({"x": values(0, 2)}, tuned / "extra.safetensors")
    found = verdict(cli, base, tuned)
    assert not found.identical and "does not name extra.safetensors: not read" in found.warnings
    named = [side / "model.safetensors.index.json" for side in (base, tuned)]
    assert verdict(cli, *named).identical, "who names an index asks for no more"


def test_what_the_user_leaves_out_does_not_count(cli: Cli, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", MODEL), write(tmp_path / "tuned", {**TIED, LAYER: values(9, 6, 8)})
    found = verdict(cli, base, tuned, "--exclude", "*mlp*")
    assert found.identical
    assert found.line == "identical in what --include and --exclude leave: every tensor has its equal"
    assert not verdict(cli, base, tuned, "--include", "*mlp*").identical
    # Nothing that is compared stands for the head any more.
    tuned = write(tmp_path / "tuned", TIED)
    found = verdict(cli, base, tuned, "--exclude", "*embed_tokens*")
    assert (found.identical, found.aliased, found.only_in_tuned) == (False, {}, [HEAD])


NAN = np.array([1, np.nan, 2], ml_dtypes.bfloat16)
ESCAPES: dict[str, tuple[Tensors, Tensors, bool]] = {
    "integers": ({"ids": np.arange(3)}, {"ids": np.array([0, 1, 3])}, False),
    "equal integers": ({"ids": np.arange(3)}, {"ids": np.arange(3)}, True),
    "booleans": ({"b": np.array([True, False])}, {"b": np.array([True, True])}, False),
    "integers of another width": ({"ids": np.arange(3)}, {"ids": np.arange(3, dtype=np.int32)}, False),
    "NaN": ({"w": NAN}, {"w": NAN}, True),
    "NaN of other bits": ({"w": NAN}, {"w": (NAN.view(np.uint16) ^ [0, 1, 0]).view(NAN.dtype)}, False),
    "NaN that was a number": ({"w": NAN}, {"w": np.array([1, 1, 2], NAN.dtype)}, False),
    "signs of zeros": ({"w": np.array([0.0, -0.0])}, {"w": np.array([-0.0, 0.0])}, True),
    "what the cast hides": ({"w": np.array([1.0])}, {"w": np.array([1 + 2.0**-40])}, False),
    "a wider dtype": ({"w": NAN}, {"w": NAN.astype(np.float32)}, True),
    "empty": ({"w": np.zeros((0, 4))}, {"w": np.zeros((0, 4))}, True),
    "empty of another shape": ({"w": np.zeros((0, 4))}, {"w": np.zeros((4, 0))}, False),
    "an empty one more": ({}, {"w": np.zeros((0, 4))}, False),
    "a scalar": ({"w": np.array(1.0)}, {"w": np.array(2.0)}, False),
    "another shape": ({"w": np.ones((2, 3))}, {"w": np.ones((3, 2))}, False),
    "another name": ({"v": np.ones(2)}, {"w": np.ones(2)}, False),
}


@pytest.mark.parametrize("compare", ["bf16", "stored"])
@pytest.mark.parametrize("case", ESCAPES)
def test_no_value_escapes(cli: Cli, tmp_path: Path, case: str, compare: str) -> None:
    *sides, equal = ESCAPES[case]
    base, tuned = (write(tmp_path / str(number), {**MODEL, **side}) for number, side in enumerate(sides))
    assert verdict(cli, base, tuned, "--compare", compare).identical == equal


def test_integers_alone_have_a_verdict_too(cli: Cli, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", {"ids": np.arange(3)}), write(tmp_path / "tuned", {"ids": np.arange(3)})
    assert verdict(cli, base, tuned).line == "identical: no value differs, and every tensor has its counterpart"
    tuned = write(tmp_path / "tuned", {"ids": np.arange(1, 4)})
    assert verdict(cli, base, tuned).line == ""
    assert "1 tensor with other bits: ids" in cli("diff", base, tuned).out


def test_a_run_file_of_before_is_not_believed(tmp_path: Path) -> None:
    """Ties went by names and shapes then, and nothing was said of what was not read."""
    base, tuned = write(tmp_path / "base", MODEL), write(tmp_path / "tuned", TIED)
    diff = ckptdiff.diff(base, tuned)
    assert diff.identical
    for facts in (diff.base, diff.tuned):
        assert facts.pop("uncompared") == []  # type: ignore[attr-defined]
    assert not diff.identical


def test_python_api(tmp_path: Path) -> None:
    base, tuned, tied = (write(tmp_path / name, tensors) for name, tensors in
                         (("base", MODEL), ("tuned", UNTIED), ("tied", TIED)))  # fmt: skip
    diff = ckptdiff.diff(base, tuned)
    assert (diff.only_in_tuned, diff.aliased, diff.identical) == ((HEAD,), (), False)
    diff = ckptdiff.diff(base, tied)
    assert (diff.only_in_tuned, diff.aliased, diff.identical) == ((), ((HEAD, EMBEDDING),), True)
    write(tied / "sub", MODEL)
    diff = ckptdiff.diff(base, tied)
    assert (diff.uncompared("base"), diff.uncompared("tuned")) == ((), ("sub/model.safetensors",))
    assert ckptdiff.open_checkpoint(tied).unread == ("sub/model.safetensors",)
    assert not diff.identical


@pytest.mark.parametrize("tied", [True, False])
def test_other_commands(cli: Cli, tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("scipy")
    moved = {**MODEL, LAYER: one_changed(MODEL[LAYER])}
    head = {HEAD: MODEL[EMBEDDING] if tied else values(2, 12, 8)}
    base, lean, full = (
        write(tmp_path / name, tensors)
        for name, tensors in (("base", {**MODEL, **head}), ("lean", moved), ("full", {**moved, **head}))
    )
    runs = [tmp_path / "lean.h5", tmp_path / "full.h5"]
    for run, step in zip(runs, (lean, full), strict=True):
        assert cli("diff", base, step, "-o", run, "--mask", "bitwise").code == 0
    assert cli("spectra", "add", runs[0]).code == 0
    with ckptdiff.RunFile(runs[0]) as file:
        assert list(file.masks) == [EMBEDDING, LAYER] and file.masks[LAYER].dense().sum() == 1
        assert file.load().spectra is not None and HEAD not in file.names
    code, out, _ = cli("mask", "list", runs[0])
    assert code == 0 and HEAD not in out
    code, out, err = cli("overlap", *runs, "--format", "json")
    assert code == 0, err
    assert cli("lora", base, lean, "-o", tmp_path / "adapter", "--rank", "2").code == 0
    code, _, err = cli("track", base, lean, full, "-o", tmp_path / "track.h5")
    assert code == 0
    assert ("lacks 1 tensor of the base" in err) == (not tied)
