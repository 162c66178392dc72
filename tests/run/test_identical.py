"""Not a digit depends on how a run went, and every mask rule takes the coordinates that NumPy takes.

The pair holds tensors of several blocks and odd sizes, all stored widths, ties by the million, and NaN and Inf.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from told_stages import told_stages

from ckptdiff.events import Event, Stage
from ckptdiff.options import MaskRule, Options
from ckptdiff.run import planning
from ckptdiff.run import tasks as stream_plan
from ckptdiff.run.engine import run
from ckptdiff.run.planning import prepare
from ckptdiff.run.tasks import GRAIN, Grain

pytestmark = pytest.mark.slow

BLOCK = 2**20
BASELINE = 100 << 20
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {BF16: "BF16", np.dtype("f2"): "F16", np.dtype("f4"): "F32", np.dtype("f8"): "F64", np.dtype("i4"): "I32"}
Array = NDArray[Any]
Side = dict[str, Array]


def write(path: Path, side: Side, shift: int = 0) -> str:
    """A safetensors file whose first tensor starts `shift` bytes after a multiple of 8."""
    header: dict[str, Any] = {}
    end = 0
    for name, values in side.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": DTYPES[values.dtype], "shape": values.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * ((shift - len(text)) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in side.values():
            file.write(values.tobytes())
    return str(path)


def moved(rng: np.random.Generator, base: Array, share: float, scale: float) -> Array:
    """A copy of which a share of the coordinates took a Gaussian step."""
    step = np.where(rng.random(base.size) < share, rng.normal(0, scale, base.size), 0).reshape(base.shape)
    return (base.astype(np.float64) + step).astype(base.dtype)


def sprinkle(rng: np.random.Generator, base: Array, tuned: Array) -> None:
    """NaN and Inf on the base, on the tuned side, and equal ones on both."""
    places = rng.choice(base.size, 60, replace=False).reshape(6, 10)
    for row, (left, right) in zip(
        places,
        [(np.nan, 1), (1, np.nan), (np.inf, 1), (1, -np.inf), (np.nan, np.nan), (np.inf, np.inf)],
        strict=True,
    ):
        base.reshape(-1)[row], tuned.reshape(-1)[row] = left, right


def make_sides() -> tuple[Side, Side]:
    rng = np.random.default_rng(11)
    base: Side = {
        "layers.0.mlp.up_proj.weight": rng.normal(0, 0.02, (3, BLOCK + 4099)).astype(np.float32),
        "ties": rng.choice([0.02, -0.02, 0.5], 3 * BLOCK + 77).astype(BF16),
        "layers.0.self_attn.q_proj.weight": rng.normal(0, 0.02, (1023, 1027)).astype(BF16),
        "half": rng.normal(0, 0.02, BLOCK + 1).astype(np.float16),
        "double": rng.normal(0, 0.02, (71, 101)),
        "few": rng.normal(0, 1, 5001).astype(np.float32),
        "frozen": rng.normal(0, 1, 333).astype(BF16),
        "ids": rng.integers(0, 9, BLOCK + 9).astype(np.int32),
        "one": np.array(2.0, BF16),
        "none": np.zeros((0, 5), np.float32),
    }
    tuned = {name: moved(rng, values, 0.3, 1e-4) for name, values in base.items() if values.dtype.kind != "i"}
    ulps = rng.choice([0, 1, 2], base["ties"].size, p=[0.5, 0.49, 0.01]).astype(np.uint16)
    tuned["ties"] = (base["ties"].view(np.uint16) + ulps).view(BF16)
    tuned["few"] = np.where(np.arange(5001) % 100 == 0, base["few"] + np.float32(0.25), base["few"])
    tuned["frozen"] = base["frozen"].copy()
    tuned["ids"] = base["ids"] + (np.arange(base["ids"].size) % 5 == 0)
    for name in ("layers.0.mlp.up_proj.weight", "ties", "half", "double"):
        sprinkle(rng, base[name], tuned[name])
    return base, {name: tuned[name].astype(values.dtype) for name, values in base.items()}


class Pair:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays = make_sides()
        self.paths = (
            write(folder / "base.safetensors", self.arrays[0]),
            write(folder / "tuned.safetensors", self.arrays[1]),
        )

    def run(self, paths: tuple[str, str] | None = None, grain: Grain = GRAIN, **options: Any) -> dict[str, bytes]:
        """Everything a run found, as bytes: columns as they were returned, and all that the run file keeps."""
        out = self.folder / "run.h5"
        diff = run(*(paths or self.paths), out=out, options=Options(**options), grain=grain)
        found = {f"result {name}": values.tobytes() for name, values in diff.columns.items()}
        with h5py.File(out) as file:
            for group in ("tensors", "histograms", "masks"):
                for name, dataset in file[group].items():
                    text = dataset.dtype == "O"
                    found[f"{group} {name}"] = repr(list(dataset)).encode() if text else dataset[:].tobytes()
        out.unlink()
        return found

    @cache  # noqa: B019
    def expected(self, name: str, compare: str) -> Expected:
        return Expected(self.arrays[0][name], self.arrays[1][name], compare)

    def least_memory(self, **options: Any) -> int:
        """The bound that one thread just fits into."""
        plan = prepare(*self.paths, out=self.folder / "run.h5", options=Options(**options))
        return stream_plan.fit_memory(plan.loads, 1, 0, 1, 0, BASELINE, True).projected


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("identical"))
    yield made
    for path in made.folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("compare", "mask"), [("bf16", "abs:1e-05"), ("bf16", "top:10"), ("stored", "rel:0.001"), ("stored", "top:10")]
)
def test_no_digit_depends_on_how_a_run_went(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, compare: str, mask: str
) -> None:
    monkeypatch.setattr(planning, "resident", lambda: BASELINE)  # this process is of another size each time
    asked = {"compare": compare, "mask": MaskRule.parse(mask)}
    expected = pair.run(threads=1, io="mmap", **asked)
    assert len(expected) > 100 and sum(name.startswith("masks ") for name in expected) == 10
    for blocks, how in (
        (8, {"threads": 2, "io": "pread"}),
        (8, {"threads": 7, "max_memory": pair.least_memory(threads=7, **asked)}),
        (1, {"threads": 7, "io": "mmap", "max_memory": 2 << 30}),
        (1, {"threads": 1, "io": "pread"}),
        (2, {"threads": 2}),
    ):
        found = pair.run(grain=Grain(blocks=blocks), **how, **asked)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], how


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_no_digit_depends_on_where_a_file_puts_its_bytes(pair: Pair, io: str) -> None:
    expected = pair.run(io=io)
    with ExitStack() as stack:
        shifted = []
        for number, (side, arrays) in enumerate(zip(("base", "tuned"), pair.arrays, strict=True)):
            path = pair.folder / f"shifted-{side}.safetensors"
            stack.callback(path.unlink)
            shifted.append(write(path, arrays, shift=2 + 3 * number))
        assert pair.run((shifted[0], shifted[1]), io=io) == expected


@pytest.mark.parametrize("mask", ["abs:1e-05", "top:1"])
def test_progress_counts_every_byte_once(pair: Pair, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passes the mask takes, and whether it is made in the first of them."""
    events: list[Event] = []
    options = Options(mask=MaskRule.parse(mask))
    # Events of a stage come no more often than anyone looks; here every one is wanted.
    monkeypatch.setattr("ckptdiff.events.Stage", partial(Stage, often=0.0))
    diff = run(*pair.paths, out=pair.folder / "run.h5", options=options, listener=events.append)
    told = told_stages(events)["comparing"]
    assert told[-1].done == sum(v.nbytes for side in pair.arrays for v in side.values())
    plan = prepare(*pair.paths, out=pair.folder / "run.h5", options=options)
    assert len({event.done for event in told}) >= len(list(stream_plan.plan_tasks(plan.loads)))
    valued = diff.columns["valued"] == 1
    assert told[-1].compared == diff.columns["numel"][valued].sum()
    assert told[-1].unchanged == diff.columns["unchanged_bitwise"][valued].sum()


def cast(values: Array, compare: str) -> tuple[Array, Array]:
    """Bits and values after the cast."""
    if compare == "bf16" or values.dtype == BF16:
        codes = values.astype(np.float32).astype(BF16) if values.dtype != BF16 else values
        return codes.view(np.uint16), codes.astype(np.float32)
    bits = values.view(f"u{values.dtype.itemsize}")
    return bits, values.astype(np.float32) if values.dtype.itemsize < 4 else values


class Expected:
    """What NumPy makes of a whole tensor."""

    def __init__(self, base: Array, tuned: Array, compare: str) -> None:
        (left, self.w0), (right, w1) = cast(base.reshape(-1), compare), cast(tuned.reshape(-1), compare)
        self.changed = (left != right) & ~((self.w0 == 0) & (w1 == 0))
        with np.errstate(invalid="ignore"):
            self.size = np.abs(w1 - self.w0).astype(np.float64)
            self.larger = np.fmax(np.abs(self.w0), np.abs(w1)).astype(np.float64)
        self.finite = np.isfinite(self.size)
        self.strange = self.changed & ~self.finite

    def above(self, cut: float | Array) -> Array:
        with np.errstate(invalid="ignore"):
            inside: Array = self.strange | (self.changed & (self.size > cut))
        return inside

    @cached_property
    def rms(self) -> float:
        return math.sqrt(math.fsum(self.w0[self.finite].astype(np.float64) ** 2) / max(1, np.sum(self.finite)))

    def rank(self, percent: float) -> int:
        return max(1, math.ceil(Fraction(str(percent)) / 100 * self.size.size))


def masks(pair: Pair, compare: str, mask: str) -> Iterator[tuple[str, Array, Expected]]:
    """Name, mask bits and expectation of each floating tensor; the figure `changed` counts the bits."""
    out = pair.folder / "masks.h5"
    diff = run(*pair.paths, out=out, options=Options(compare=compare, mask=MaskRule.parse(mask)))  # type: ignore[arg-type]
    with h5py.File(out) as file:
        for row, facts in enumerate(diff.tensors):
            base, tuned = (side[facts.name] for side in pair.arrays)
            bits = np.unpackbits(file["masks"][facts.name][:], count=base.size, bitorder="little").astype(bool)
            assert bits.sum() == diff.columns["changed"][row], facts.name
            if facts.compare == "bitwise":
                np.testing.assert_array_equal(bits, (base != tuned).reshape(-1))
            else:
                yield facts.name, bits, pair.expected(facts.name, compare)
    out.unlink()


@pytest.mark.parametrize(
    ("mask", "compare"),
    [
        ("bitwise", "bf16"),
        ("abs:0", "stored"),
        ("abs:0.0001", "bf16"),
        ("eta:0.005", "bf16"),
        ("eta:0.005", "stored"),
        ("rel:0.003", "bf16"),
        ("rel:0.003", "stored"),
    ],
)
def test_masks_of_rules_that_look_at_one_coordinate(pair: Pair, compare: str, mask: str) -> None:
    kind, _, number = mask.partition(":")
    seen = 0
    for name, bits, expected in masks(pair, compare, mask):
        wanted = {
            "bitwise": lambda e=expected: e.changed,
            "abs": lambda e=expected: e.above(float(number)),
            "eta": lambda e=expected: e.above(float(number) * e.larger),
            "rel": lambda e=expected: e.above(float(number) * e.rms),
        }[kind]()
        np.testing.assert_array_equal(bits, wanted, err_msg=name)
        seen += 1
    assert seen == 9


@pytest.mark.parametrize(
    ("percent", "compare"), [("10", "bf16"), ("10", "stored"), ("0.001", "bf16"), ("0.001", "stored"), ("100", "bf16")]
)
def test_top_takes_exactly_its_share(pair: Pair, compare: str, percent: str) -> None:
    for name, bits, expected in masks(pair, compare, f"top:{percent}"):
        rank, changed, strange = expected.rank(float(percent)), expected.changed.sum(), expected.strange.sum()
        assert bits.sum() == max(strange, min(rank, changed)), name
        assert not (bits & ~expected.changed).any() and bits[expected.strange].all(), name
        finite = bits & expected.finite
        left_out = expected.changed & expected.finite & ~bits
        if finite.any() and left_out.any():
            assert expected.size[finite].min() >= expected.size[left_out].max(), name


def test_ties_are_taken_evenly_from_the_whole_tensor(pair: Pair) -> None:
    """Half of the tied coordinates means half of those in every part, not those that come first."""
    for name, bits, expected in masks(pair, "bf16", "top:10"):
        if name != "ties":
            continue
        cut = expected.size[bits & expected.finite].min()
        tied = expected.changed & (expected.size == cut)
        assert BLOCK / 4 < bits.sum() < tied.sum()
        shares = [bits[part].sum() / part.size for part in np.array_split(np.flatnonzero(tied), 50)]
        assert max(shares) - min(shares) < 1e-3
