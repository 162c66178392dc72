"""Size and time of exact deltas beside other ways to ship an update: medians of rounds, taken in turns.

    python bench/delta_speed.py --size 1GiB

Llama-shaped bf16 pairs whose changed positions are drawn afresh for each tensor: 9.5 % moved by one to three steps, as
a fine-tune, and 1.5 %, as between two steps of RL training. Beside `patch make` stand `diff -o`, zstd level 1 of the
exclusive or, and `zstd --patch-from` where zstd is installed; beside `patch apply` a copy of the files that is synced
too. What `apply` writes is compared with the tuned side.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_pair import parse_size
from measure import run
from safetensors.numpy import save_file

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "gate_proj": (5632, 2048), "down_proj": (2048, 5632)}
SHARES = (0.095, 0.015)
_SEED = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="bytes of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the pairs; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    given = parser.parse_args()
    found = {}
    for share in SHARES:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found[str(share)] = compare(Path(folder), parse_size(given.size), share, given.rounds)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(folder: Path, size: int, share: float, rounds: int) -> dict[str, float]:
    """One pair: sizes beside the entropy of mask and steps, times beside those of the other ways."""
    entropy = make_sides(folder, size, share)
    base, tuned, delta, out = (folder / name for name in ("base", "tuned", "step.ckptdelta", "out"))
    dense = sum(path.stat().st_size for path in tuned.iterdir())
    program = [sys.executable, "-m", "ckptdiff"]
    ways: dict[str, Callable[[], list[str]]] = {
        "diff -o": lambda: [*program, "diff", str(base), str(tuned), "-o", str(folder / "run.h5"), "--mask", "bitwise"],
        "make": lambda: [*program, "patch", "make", str(base), str(tuned), "-o", str(delta), "-q"],
        "apply": lambda: [*program, "patch", "apply", str(base), str(delta), "-o", str(out), "-q"],
        # On the disk, as what `apply` writes is before it takes its name.
        "copy": lambda: ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(tuned), str(out)],
        "zstd -1 of the xor": lambda: [sys.executable, __file__, "xor", str(base), str(tuned), str(folder / "xor.zst")],
    }
    if shutil.which("zstd"):
        files = [str(next(side.glob("*.safetensors"))) for side in (base, tuned)]
        ways["zstd --patch-from"] = lambda: [
            "zstd",
            "-q",
            "-f",
            "-3",
            "--long=31",
            "-T2",
            f"--patch-from={files[0]}",
            files[1],
            "-o",
            str(folder / "from.zst"),
        ]
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for place in range(rounds + 1):
        for name, words in ways.items():
            for old in (out,) if name in ("apply", "copy") else (delta,) if name == "make" else ():
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            done = run(words())
            if name == "apply":
                same = all((out / path.name).read_bytes() == path.read_bytes() for path in tuned.iterdir())
                assert same, "the result is not the tuned side"
            if place:  # the first round compiles, and fills the page cache
                times[name].append(done.seconds)
                peaks[name] = max(peaks.get(name, 0), done.peak_rss)
    sizes = {"make": delta.stat().st_size, "zstd -1 of the xor": (folder / "xor.zst").stat().st_size}
    if "zstd --patch-from" in ways:
        sizes["zstd --patch-from"] = (folder / "from.zst").stat().st_size
    print(f"{share:.1%} of the codes moved; mask and steps have an entropy of {entropy / dense:.4f} of the checkpoint")
    for name, taken in times.items():
        part = f"{sizes[name] / dense:8.4f} of it" if name in sizes else ""
        print(f"  {name:<20}{statistics.median(taken):8.2f} s {peaks[name] / 1e6:8.0f} MB  {part}")
    median = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {
        "size / dense": sizes["make"] / dense,
        "size / entropy": sizes["make"] / entropy,
        "make / diff -o": median["make"] / median["diff -o"],
        "apply / copy": median["apply"] / median["copy"],
    }
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    return {**median, **ratios, "peak": max(peaks[name] for name in ("make", "apply"))}


def make_sides(folder: Path, size: int, share: float) -> float:
    """Write both sides; returns the entropy of mask and steps, in bytes (Shannon 1948)."""
    rng = np.random.default_rng(_SEED)
    sides: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    held = layer = 0
    while held < size:
        for module, shape in SHAPES.items():
            weights = (rng.standard_normal(math.prod(shape), np.float32) * 0.02).view(np.uint32) >> 16
            codes = weights.astype(np.uint16)
            moved = np.flatnonzero(rng.random(codes.size, np.float32) < share)
            steps = rng.choice(np.array([-3, -2, -1, 1, 2, 3]), moved.size, p=[0.02, 0.03, 0.45, 0.45, 0.03, 0.02])
            tuned = codes.copy()
            tuned[moved] += steps.astype(np.uint16)
            for side, values in zip(sides, (codes, tuned), strict=True):
                side[f"model.layers.{layer}.{module}.weight"] = values.view(np.uint16).reshape(shape)
            held += codes.nbytes
        layer += 1
    count = held // 2
    for name, side in zip(("base", "tuned"), sides, strict=True):
        (folder / name).mkdir()
        save_file(side, folder / name / "model.safetensors")
        as_bf16(folder / name / "model.safetensors")
    chances = np.array([share * p for p in (0.02, 0.03, 0.45, 0.45, 0.03, 0.02)] + [1 - share])
    return count * float(-(chances * np.log2(chances)).sum()) / 8


def as_bf16(path: Path) -> None:
    """Let the header of a file of U16 say BF16, for which NumPy has no type."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def xor(base: str, tuned: str, out: str) -> None:
    """The exclusive or of all tensors through zstd level 1, on two threads."""
    import zstandard

    writer = zstandard.ZstdCompressor(level=1, threads=2)
    with Path(out).open("wb") as target, writer.stream_writer(target) as stream:
        files = [next(Path(side).glob("*.safetensors")) for side in (base, tuned)]
        raw = [np.memmap(file, np.uint8, "r") for file in files]
        for start in range(0, raw[0].size, 1 << 24):
            stream.write((raw[0][start : start + (1 << 24)] ^ raw[1][start : start + (1 << 24)]).tobytes())


if __name__ == "__main__":
    xor(*sys.argv[2:]) if sys.argv[1:2] == ["xor"] else main()
