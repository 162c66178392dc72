"""The engine against the golden figures, which a NumPy oracle computed from whole tensors in float64."""

import json
import math
from pathlib import Path

import pytest

from ckptdiff.options import Options
from ckptdiff.run.engine import run

FIXTURES = Path(__file__).parents[2] / "fixtures"
CASES = sorted(path.stem for path in (FIXTURES / "golden").glob("*.json"))
NOT_GOLDEN = {"delta_energy_share"}


def assert_figures(got, expected, where):
    for key in got.keys() - NOT_GOLDEN:
        assert_close(got[key], expected[key], f"{where}.{key}", key)


def assert_close(got, expected, where, key):
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), where
        for parameter in got:
            assert_close(got[parameter], expected[parameter], f"{where}.{parameter}", key)
    elif isinstance(expected, int) or expected is None or got is None:
        assert got == expected, where
    elif key == "cosine":
        assert 1 - got == pytest.approx(1 - expected, rel=1e-6, abs=3e-16), where
    else:
        # tuned_norm and cosine follow from a d rounded to float32 where the sides are wider than bfloat16.
        tolerance = 1e-8 if key in ("tuned_norm", "low_coverage_null", "unchanged_null") else 1e-12
        assert math.isclose(got, expected, rel_tol=tolerance, abs_tol=1e-15), f"{where}: {got} != {expected}"


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("compare", ["bf16", "stored"])
@pytest.mark.parametrize("case", CASES)
def test_engine_gives_golden_figures(case, compare, device):
    golden = json.loads((FIXTURES / "golden" / f"{case}.json").read_text())[compare]
    diff = run(
        str(FIXTURES / case / "base"),
        str(FIXTURES / case / "tuned"),
        options=Options(compare=compare, values="codes", device=device),
    )
    rows = {row["name"]: row for row in golden["tensors"]}
    assert [tensor.name for tensor in diff.tensors] == [t.name for t in diff.tensors if t.name in rows]
    assert len(rows) == len(diff.tensors)
    for tensor, figures in zip(diff.tensors, diff.per_tensor, strict=True):
        expected = rows[tensor.name]
        assert tensor.compare == (expected["compare_dtype"] or "bitwise").lower()
        assert_figures(figures, expected, tensor.name)
    assert_figures(diff.overall, golden["global"], "global")
