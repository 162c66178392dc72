"""The library's front door: what is exported, what importing it costs, and one whole use."""

import ast
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file
from told_stages import told_stages

import ckptdiff
from ckptdiff import errors
from ckptdiff.events import Finished, StageProgress, Started, TensorsDone

LLAMA = Path(__file__).parent.parent / "fixtures" / "llama"


PUBLIC = {
    "": [
        "ChangedFileError",
        "Checkpoint",
        "CheckpointError",
        "CkptdiffError",
        "ClusterError",
        "DeviceError",
        "Diff",
        "HeaderError",
        "IndexFileError",
        "Mask",
        "MaskError",
        "MaskRule",
        "OptionError",
        "Options",
        "PairingError",
        "PatchError",
        "PlanError",
        "RunFile",
        "RunFileError",
        "SpectraOptions",
        "TensorFacts",
        "TensorInfo",
        "__version__",
        "diff",
        "open_checkpoint",
        "parse_size",
    ],
    "claims": ["PUBLISHED", "Verdict", "figures_of", "judge_claims"],
    "exports": [
        "Applied",
        "Layout",
        "LeftOut",
        "ShiraExport",
        "apply_patch",
        "export_masks",
        "export_patch",
        "export_shira",
        "missing_from_patch",
    ],
    "lora": ["Extracted", "Extraction", "extract_lora"],
    "overlap": ["Operation", "Overlap", "PairCounts", "combine_masks", "overlap"],
    "patch": [
        "AppliedDelta",
        "Change",
        "Delta",
        "MadeDelta",
        "PatchContents",
        "Shipped",
        "ShippedContents",
        "TensorDelta",
        "apply",
        "apply_in_place",
        "apply_to",
        "contents_of",
        "contents_of_flat",
        "contents_of_folder",
        "make",
        "make_directory",
        "make_flat",
        "open",
        "squash",
        "verify",
    ],
    "retrain": [
        "Freezing",
        "MaskCallback",
        "MaskedAdamW",
        "MaskedSGD",
        "MatchReport",
        "PackedMask",
        "ParameterMasks",
        "TrackCallback",
        "freeze_outside",
        "load_masks",
        "mask_gradients",
    ],
    "spectra": ["add_spectra"],
    "track": ["Track", "load_track", "save_track", "track"],
}
"""What users may rely on: to add a name, or to lose one, takes a change here."""


def module_of(room: str) -> ModuleType:
    module = getattr(ckptdiff, room) if room else ckptdiff
    assert isinstance(module, ModuleType)
    return module


def test_the_public_names_are_these():
    assert {room: module_of(room).__all__ for room in PUBLIC} == PUBLIC
    assert {room for room in PUBLIC if room} == set(dir(ckptdiff)) - set(ckptdiff.__all__)
    for room, names in PUBLIC.items():
        for name in names:
            found = getattr(module_of(room), name)
            assert found.__doc__ or not (isfunction(found) or isclass(found))
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            module_of(room).nonsense  # noqa: B018


def test_every_error_of_the_tree_can_be_imported_and_is_drawn():
    leaves = {name: leaf for name, leaf in vars(errors).items() if isinstance(leaf, type)}
    leaves = {name: leaf for name, leaf in leaves.items() if issubclass(leaf, Exception)}
    assert len(leaves) == 13
    above: list[str] = []
    drawn = {}
    for line in errors.__doc__.splitlines():
        if (found := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line)) is not None:
            del above[len(found[1]) // 4 :]
            drawn[found[2]] = above[-1] if above else "Exception"
            above.append(found[2])
    assert drawn == {name: leaf.__base__.__name__ for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        assert getattr(ckptdiff, name) is leaf and name in ckptdiff.__all__


def test_no_error_is_raised_that_the_tree_lacks():
    for path in Path(ckptdiff.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & set(ckptdiff.__all__), f"{node.name} of {path} belongs into errors.py"


def test_the_keywords_of_diff_are_the_options():
    given = signature(ckptdiff.diff).parameters
    options = {field.name: field.default for field in fields(ckptdiff.Options)}
    own = ["base", "tuned", "out", "listener", "title", "resume", "engine", "ray_address", "parallel", "ray_env"]
    assert set(given) == {*options, *own}
    assert {given[name].kind for name in given if name not in own[:2]} == {Parameter.KEYWORD_ONLY}
    # A mask rule may be given as text.
    assert {name: str(given[name].default) for name in options} == {name: str(value) for name, value in options.items()}
    assert ckptdiff.MaskRule.parse(given["mask"].default) == options["mask"]
    defaults = [Parameter.empty, Parameter.empty, None, None, None, False, "local", None, 0, ()]
    assert [given[name].default for name in own] == defaults


@pytest.mark.parametrize("room", PUBLIC)
def test_keywords_are_spelled_out_with_types(room):
    for name in PUBLIC[room]:
        found = getattr(module_of(room), name)
        if isfunction(found):
            for parameter in signature(found).parameters.values():
                assert parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL), f"{name}({parameter})"
                assert parameter.annotation not in (Parameter.empty, "Any"), f"{name}({parameter})"


@pytest.mark.parametrize("room", PUBLIC)
def test_docstrings_name_every_parameter_what_is_returned_and_raised(room):
    for name in PUBLIC[room]:
        found = getattr(module_of(room), name)
        if isfunction(found):
            given, sections = signature(found), re.split(r"\n    (\w+)\n    -+\n", found.__doc__)
            told = dict(zip(sections[1::2], sections[2::2], strict=True))
            listed = re.findall(r"^ {4}(\w[\w, ]*) : ", told["Parameters"], re.M)
            assert [each for names in listed for each in names.split(", ")] == list(given.parameters), name
            assert "Raises" in told and ("Returns" in told) == (given.return_annotation != "None"), name


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'maks'"):
        ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", maks="bitwise")


def test_lists_and_tuples_are_one():
    given = {"include": ["*norm*", "*up_proj*"], "exclude": ["*.0.*"], "groups": ["mlp=mlp"], "renames": ["^x=y"]}
    listed = ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", **given)
    tupled = ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", **{name: tuple(texts) for name, texts in given.items()})
    assert listed.overall == tupled.overall and listed.tensors == tupled.tensors
    assert {name: listed.options[name] for name in given} == given == {name: tupled.options[name] for name in given}


def test_one_text_is_not_taken_for_several(tmp_path):
    base, tuned, out = LLAMA / "base", LLAMA / "tuned", tmp_path / "run.h5"
    for name in ("renames", "include", "exclude", "groups"):
        with pytest.raises(ckptdiff.OptionError, match=f"{name} takes several") as caught:
            ckptdiff.diff(base, tuned, out=out, **{name: "*norm*"})
        assert caught.value.found == "'*norm*'"
    assert not out.exists()
    ckptdiff.diff(base, tuned, out=out, include=["*up_proj*"])
    for several, attempt in (
        ("steps", lambda: ckptdiff.track.track(base, tuned)),
        ("steps", lambda: ckptdiff.track.track(base, str(tuned))),
        ("include", lambda: ckptdiff.track.track(base, [tuned], include="*up_proj*")),
        ("exclude", lambda: ckptdiff.track.track(base, [tuned], exclude="*up_proj*")),
        ("paths", lambda: ckptdiff.overlap.overlap(str(out))),
        ("paths", lambda: ckptdiff.overlap.combine_masks("union", str(out), tmp_path / "new")),
    ):
        with pytest.raises(ckptdiff.OptionError, match=f"{several} takes several"):
            attempt()
    exports = ckptdiff.exports
    with ckptdiff.RunFile(out) as run:
        for attempt in (
            lambda: exports.export_masks(run, tmp_path / "new.npz", names="*up_proj*"),
            lambda: exports.export_patch(run, tmp_path / "new.safetensors", names="*up_proj*"),
            lambda: exports.export_shira(run, tmp_path / "new", rank=1, names="*up_proj*"),
            lambda: exports.missing_from_patch(run, "*up_proj*"),
        ):
            with pytest.raises(ckptdiff.OptionError, match="names takes several"):
                attempt()
    assert list(tmp_path.iterdir()) == [out]


def test_paths_may_be_text(tmp_path, monkeypatch):
    """What is written is the same, and where it was asked for."""
    monkeypatch.chdir(tmp_path)
    base, tuned = str(LLAMA / "base"), str(LLAMA / "tuned")
    options = {"compare": "stored", "mask": "bitwise", "include": ["*up_proj*"]}
    ckptdiff.diff(base, tuned, out="run.h5", **options)
    with ckptdiff.RunFile("run.h5") as run:
        ckptdiff.exports.export_masks(run, "masks.npz")
        ckptdiff.exports.export_patch(run, "patch.safetensors")
        ckptdiff.exports.export_shira(run, "shira", rank=1)
    ckptdiff.exports.apply_patch(base, "patch.safetensors", "patched")
    ckptdiff.lora.extract_lora(base, tuned, "lora", rank=2)
    with_spectra = ckptdiff.spectra.add_spectra("run.h5", max_memory="2G")
    assert ckptdiff.diff("patched", tuned, **options).identical
    assert {path.name for path in tmp_path.iterdir()} == {
        *("run.h5", "masks.npz", "patch.safetensors", "shira", "patched", "lora")
    }
    with ckptdiff.RunFile("run.h5") as run:
        assert run.load().median_2d == with_spectra.median_2d and with_spectra.spectra.mode == "randomized"


@pytest.mark.parametrize(("given", "match"), [({"rank": 0}, "rank"), ({"rank": 9, "energy": 1.5}, "energy")])
def test_an_adapter_of_an_impossible_rank_is_refused(tmp_path, given, match):
    with pytest.raises(ckptdiff.OptionError, match=f"{match} out of range"):
        ckptdiff.lora.extract_lora(LLAMA / "base", LLAMA / "tuned", tmp_path / "adapter", **given)
    assert not list(tmp_path.iterdir())


def test_spectra_of_an_unknown_mode_are_refused(tmp_path):
    before = ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", out=tmp_path / "run.h5", include=["*up_proj*"])
    with pytest.raises(ckptdiff.OptionError, match="unknown kind of spectra"):
        ckptdiff.spectra.add_spectra(tmp_path / "run.h5", "approximate")
    with pytest.raises(ckptdiff.OptionError, match="not a size"):
        ckptdiff.spectra.add_spectra(tmp_path / "run.h5", max_memory="much")
    with pytest.raises(ckptdiff.OptionError, match="holds no spectra"):
        ckptdiff.claims.judge_claims(before)


def test_importing_loads_no_numerical_library():
    code = "import sys, ckptdiff; print(sorted({'numpy', 'numba', 'h5py', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_one_whole_use(tmp_path):
    out, events = tmp_path / "run.h5", []
    diff = ckptdiff.diff(
        LLAMA / "base", LLAMA / "tuned", out=out, mask="bitwise", exclude=["*norm*"], listener=events.append
    )
    with ckptdiff.RunFile(out) as run:
        assert run.load().overall == diff.overall
        mask = run.masks["lm_head.weight"]
    assert diff.mask_rule == "bitwise" and not any("norm" in tensor.name for tensor in diff.tensors)
    row = next(i for i, tensor in enumerate(diff.tensors) if tensor.name == "lm_head.weight")
    assert mask.count == diff.columns["numel"][row] - diff.columns["unchanged_bitwise"][row]
    shown = (Started, StageProgress, TensorsDone, Finished)
    kinds = [type(event) for event in events if isinstance(event, shown) and getattr(event, "stage", "") != "compiling"]
    assert kinds[0] is Started and kinds[-1] is Finished
    stages = list(told_stages(events))
    assert stages[stages.index("comparing") :] == ["comparing", "writing"]
    done = [facts for event in events if isinstance(event, TensorsDone) for facts in event.diff.tensors]
    assert tuple(done) == diff.tensors


@pytest.mark.parametrize(
    "options", [{"mask": "abs"}, {"max_memory": "much"}, {"compare": "fp4"}, {"threads": -1}, {"groups": ["a=("]}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ckptdiff.CkptdiffError):
        ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", **options)


def test_squares_beyond_float64_leave_shares_undefined(tmp_path: Path) -> None:
    base = np.array([1.0, -2.0, 1e200, 3.0])
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": base + np.array([0.0, 1.0, 3e199, 0.0])}, tmp_path / "tuned.safetensors")
    diff = ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored")
    assert diff.overall["unchanged_bitwise"] == 0.5
    assert diff.overall["max_abs"] == pytest.approx(3e199)
    assert set(diff.overall["coord_energy"].values()) == {None}


@pytest.mark.parametrize("side", ["base", "update"])
def test_sums_beyond_float64_are_no_figures(tmp_path: Path, side: str) -> None:
    rng = np.random.default_rng(5)
    plain, step = rng.normal(size=(40, 50)), rng.normal(size=(40, 50)) * 1e-4 * (rng.random((40, 50)) < 0.3)
    large, far = plain.copy(), step.copy()
    if side == "base":
        large[3, :5] = [1e155, -1e200, 1e308, -1e308, 1e308]
    else:
        far[3, :4] = [1.7e308, 1.7e308, -1.7e308, -1.7e308]  # in sums of both signs
    save_file({"large": large, "plain": plain}, tmp_path / "base.safetensors")
    save_file({"large": large + far, "plain": plain + step}, tmp_path / "tuned.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff = ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored")
        rows = {facts.name: row for facts, row in zip(diff.tensors, diff.per_tensor, strict=True)}
        shown = [rows["large"], diff.overall, *diff.grouped("module")]
    squares = {"rel_norm", "cosine", "tuned_norm"}
    undefined = squares | ({"base_norm"} if side == "base" else {"delta_norm", "l1", "mean", "delta_energy_share"})
    for row in shown:
        assert {key for key in undefined if row[key] is not None} == set()
        figures = row["unchanged_rel"] if side == "base" else row["coord_energy"]
        assert set(figures.values()) == {None}
    moved = (large + far) - large
    assert rows["large"]["unchanged_abs"]["1e-05"] == np.mean(np.abs(moved) <= 1e-5)
    assert rows["large"]["max_abs"] == np.abs(moved).max()
    delta = (plain + step) - plain
    expected = np.mean(np.abs(delta) <= 1e-3 * np.sqrt(np.mean(plain**2)))
    assert rows["plain"]["unchanged_rel"]["0.001"] == expected
    assert rows["plain"]["rel_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(plain))
    if side == "base":
        with pytest.raises(ckptdiff.CkptdiffError, match="beyond float64"):
            ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored", mask="rel:1")
