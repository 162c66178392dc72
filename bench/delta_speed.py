"""Size and time of exact deltas beside other ways to ship an update: medians of rounds, taken in turns.

    python bench/delta_speed.py --size 1GiB

Llama-shaped bf16 pairs whose changed positions are drawn afresh for each tensor: 9.5 % moved by one to three steps, as
a fine-tune, and 1.5 %, as between two steps of RL training. Beside `patch make` stand `diff -o`, zstd level 1 of the
exclusive or, and `zstd --patch-from` where zstd is installed; beside `patch apply` a copy of the files that is synced
too. What `apply` writes is compared with the tuned side. `--peers PYTHON` names an interpreter that has
fireworks-delta-compression and reminis. Then come as many bytes in small tensors, beside as many in large ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from make_pair import parse_size
from measure import Run, run
from safetensors.numpy import save_file

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "gate_proj": (5632, 2048), "down_proj": (2048, 5632)}
SHARES = (0.095, 0.015)
STEPS = {-3: 0.02, -2: 0.03, -1: 0.45, 1: 0.45, 2: 0.03, 3: 0.02}
"""Steps of the codes that moved, and how often each comes."""
_SEED = 11
_FIREWORKS = """
import sys
import fireworks_delta_compression.compression as by
does, *paths, kind = sys.argv[1:]
if does == "make":
    names = dict(zip(("src", "dst", "diff_file"), paths))
    by.delta_compress_files_to_file(**names, compression_format=kind, must_match=True)
else:
    by.decompress_delta_into_source(*paths, kind)
"""
Words = Sequence[str | Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="bytes of each side")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of the codes that move")
    parser.add_argument("--small", type=int, default=30_000, help="small tensors of each side; 0: none")
    parser.add_argument("--codes", type=int, default=4096, help="how many codes a small tensor has, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="a Python with the packages of peers")
    parser.add_argument("--folder", type=Path, help="where to write the pairs; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    given = parser.parse_args()
    found = {}
    for share in given.shares:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found[str(share)] = compare(Path(folder), parse_size(given.size), share, given.rounds, given.peers)
    if given.small:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found["small"] = compare_small(Path(folder), given.small, given.codes, given.rounds)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def program(*words: str | Path) -> list[str | Path]:
    """A command of ckptdiff."""
    return [sys.executable, "-m", "ckptdiff", *words]


def compare(folder: Path, size: int, share: float, rounds: int, peers: str | None) -> dict[str, float]:
    """One pair: sizes beside the entropy of mask and steps, times beside those of the other ways."""
    entropy = make_sides(folder, size, share)
    base, tuned, out = (folder / name for name in ("base", "tuned", "out"))
    files = [next(side.glob("*.safetensors")) for side in (base, tuned)]
    dense = files[1].stat().st_size
    ways: dict[str, tuple[Words, Path]] = {
        "diff -o": (program("diff", base, tuned, "-o", folder / "run.h5", "--mask", "bitwise"), folder / "run.h5"),
        **own_ways(folder),
        # On the disk, as what `apply` writes is before it takes its name.
        "copy": (["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', tuned, out], out),
        "zstd -1 of the xor": ([sys.executable, __file__, "xor", base, tuned, folder / "xor.zst"], folder / "xor.zst"),
    }
    if shutil.which("zstd"):
        words = ["zstd", "-q", "-3", "--long=31", "-T2", f"--patch-from={files[0]}", files[1], "-o", folder / "from"]
        ways["zstd --patch-from"] = words, folder / "from"
    if peers:
        for kind in ("arc_v2", "arc_v3"):
            pack = folder / kind
            ways[f"fireworks {kind}"] = [peers, "-c", _FIREWORKS, "make", *files, pack, kind], pack
            ways[f"fireworks {kind} apply"] = [peers, "-c", _FIREWORKS, "apply", pack, files[0], kind], folder / "none"
        reminis = Path(peers).with_name("reminis")
        databases = [folder / f"{side.name}.db" for side in (base, tuned)]
        for side, database in zip((base, tuned), databases, strict=True):
            run([reminis, "convert", side, "-o", database, "-q"])
        pack = folder / "reminis"
        ways["reminis diff"] = [reminis, "diff", *databases, "-o", pack, "-q"], pack
        words = [reminis, "apply", databases[0], pack, "-o", folder / "made.db", "-q"]
        ways["reminis apply"] = words, folder / "made.db"
    kept = folder / "kept"
    shutil.copytree(base, kept)

    def before(name: str) -> None:
        if name.startswith("fireworks"):  # which applies in place
            shutil.copy(kept / files[0].name, files[0])

    def after(name: str) -> None:
        if name in ("apply", "apply delta-dir"):
            require_same(out, tuned)
        if name.startswith("fireworks") and name.endswith("apply"):
            shutil.copy(kept / files[0].name, files[0])

    runs = in_turns(ways, rounds, before, after)
    print(f"{share:.1%} of the codes moved; mask and steps have an entropy of {entropy / dense:.4f} of the checkpoint")
    sizes = {
        name: size_of(made) / dense
        for name, (_, made) in ways.items()
        if "apply" not in name and name not in ("copy", "diff -o")
    }
    show(runs, sizes)
    seconds = {name: statistics.median(one.seconds for one in taken) for name, taken in runs.items()}
    ratios = {
        "size / dense": sizes["make"],
        "size / entropy": sizes["make"] * dense / entropy,
        "make / diff -o": seconds["make"] / seconds["diff -o"],
        "apply / copy": seconds["apply"] / seconds["copy"],
        "delta-dir / zstd": seconds["make delta-dir"] / seconds["zstd -1 of the xor"],
    }
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    return {**seconds, **ratios, "peak": max(one.peak_rss for name in ("make", "apply") for one in runs[name])}


def compare_small(folder: Path, count: int, codes: int, rounds: int) -> dict[str, float]:
    """As many bytes in small tensors and in large ones."""
    small, large = folder / "small", folder / "large"
    for one in (small, large):
        one.mkdir()
    rng = np.random.default_rng(_SEED)
    sizes = rng.integers(codes // 2, codes + codes // 2 + 1, count)
    write_sides(small, {f"model.experts.{place}.weight": (int(size),) for place, size in enumerate(sizes)}, SHARES[0])
    make_sides(large, size_of(small / "base"), SHARES[0])
    ways = {
        f"{name}, {pair.name}": way
        for name in own_ways(small)
        for pair in (small, large)
        for way in (own_ways(pair)[name],)
    }

    def after(name: str) -> None:
        if name.startswith("apply"):
            pair = folder / name.rpartition(", ")[2]
            require_same(pair / "out", pair / "tuned")

    runs = in_turns(ways, rounds, lambda name: None, after)
    nbytes = {pair.name: size_of(pair / "base") for pair in (small, large)}
    print(f"{count} tensors of {nbytes['small'] / count / 1e3:.0f} kB, {nbytes['small'] / 1e6:.0f} MB a side")
    show(runs, {})
    ratios = {}
    for name in own_ways(small):
        for what in ("seconds", "cpu"):
            of_byte = {
                pair: statistics.median(getattr(one, what) for one in runs[f"{name}, {pair}"]) / nbytes[pair]
                for pair in nbytes
            }
            ratios[f"{name}, {what} a byte"] = of_byte["small"] / of_byte["large"]
    print("  small / large: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    return ratios


def own_ways(folder: Path) -> dict[str, tuple[Words, Path]]:
    """Commands of ckptdiff for a pair, and what each makes, which must not be there before."""
    base, tuned, delta, made, out = (folder / name for name in ("base", "tuned", "step.ckptdelta", "step", "out"))
    return {
        "make": (program("patch", "make", base, tuned, "-o", delta, "-q"), delta),
        "apply": (program("patch", "apply", base, delta, "-o", out, "-q"), out),
        "make delta-dir": (program("patch", "make", base, tuned, "-o", made, "--format", "delta-dir", "-q"), made),
        "apply delta-dir": (program("patch", "apply", base, made, "-o", out, "-q"), out),
    }


def in_turns(
    ways: dict[str, tuple[Words, Path]], rounds: int, before: Callable[[str], None], after: Callable[[str], None]
) -> dict[str, list[Run]]:
    """Run all commands one after the other, again and again."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for place in range(rounds + 1):
        for name, (words, made) in ways.items():
            if made.is_dir():
                shutil.rmtree(made)
            made.unlink(missing_ok=True)
            before(name)
            done = run(words)
            after(name)
            if place:  # the first round compiles, and fills the page cache
                runs[name].append(done)
    return runs


def show(runs: dict[str, list[Run]], sizes: dict[str, float]) -> None:
    """A line for each command."""
    for name, taken in runs.items():
        seconds, cpu = (statistics.median(getattr(one, what) for one in taken) for what in ("seconds", "cpu"))
        part = f"{sizes[name]:8.4f} of it" if name in sizes else ""
        peak = max(one.peak_rss for one in taken) / 1e6
        print(f"  {name:<24}{seconds:8.2f} s {cpu:8.2f} s of processors {peak:8.0f} MB  {part}")


def require_same(made: Path, tuned: Path) -> None:
    """The result has to be the tuned side."""
    same = all((made / path.name).read_bytes() == path.read_bytes() for path in tuned.iterdir())
    assert same, "the result is not the tuned side"


def size_of(made: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in made.iterdir()) if made.is_dir() else made.stat().st_size


def make_sides(folder: Path, size: int, share: float) -> float:
    """Write both sides; returns the entropy of mask and steps, in bytes (Shannon 1948)."""
    shapes: dict[str, tuple[int, ...]] = {}
    held = layer = 0
    while held < size:
        for module, shape in SHAPES.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
            held += 2 * math.prod(shape)
        layer += 1
    write_sides(folder, shapes, share)
    chances = np.array([share * chance for chance in STEPS.values()] + [1 - share])
    return held // 2 * float(-(chances * np.log2(chances)).sum()) / 8


def write_sides(folder: Path, shapes: dict[str, tuple[int, ...]], share: float) -> None:
    """Write tensors of these shapes, and the same with that share of their codes moved."""
    rng = np.random.default_rng(_SEED)
    sides: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for name, shape in shapes.items():
        weights = (rng.standard_normal(math.prod(shape), np.float32) * 0.02).view(np.uint32) >> 16
        codes = weights.astype(np.uint16)
        moved = np.flatnonzero(rng.random(codes.size, np.float32) < share)
        steps = rng.choice(np.array(list(STEPS)), moved.size, p=list(STEPS.values()))
        tuned = codes.copy()
        tuned[moved] += steps.astype(np.uint16)
        for side, values in zip(sides, (codes, tuned), strict=True):
            side[name] = values.reshape(shape)
    for name, side in zip(("base", "tuned"), sides, strict=True):
        (folder / name).mkdir()
        save_file(side, folder / name / "model.safetensors")
        as_bf16(folder / name / "model.safetensors")


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
