"""The library's front door: what is exported, what importing it costs, and one whole use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.events import Finished, Progress, Started, TensorsDone

LLAMA = Path(__file__).parent.parent / "fixtures" / "llama"


def test_the_public_names_are_these():
    assert ckptdiff.__all__ == [
        "Checkpoint",
        "CkptdiffError",
        "Diff",
        "Mask",
        "MaskRule",
        "Options",
        "RunFile",
        "TensorFacts",
        "TensorInfo",
        "__version__",
        "diff",
        "open_checkpoint",
    ]
    for name in ckptdiff.__all__:
        assert getattr(ckptdiff, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ckptdiff.nonsense  # noqa: B018


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
    kinds = [type(event) for event in events if isinstance(event, Started | Progress | TensorsDone | Finished)]
    assert kinds[0] is Started and kinds[-1] is Finished
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
