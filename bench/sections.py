"""What `compare.py` measures, a function for each section of its report."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import statistics
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import HERE, Bench, Section, Target, ckptdiff, diff, files, in_process, nbytes, peer, row
from measure import Run, drop_cache, median, peak, run, sequential_read

FIXTURE = HERE.parent / "fixtures" / "llama"
MEMORY_LIMIT = 450e6


def check_equal(document: dict[str, Any], torch: dict[str, Any]) -> str:
    """Compare counts and norms of ckptdiff with those of the torch diff.

    Raises
    ------
    SystemExit
        If a count differs, or a norm by more than 1e-9.
    """
    figures = document["global"]
    numel = sum(tensor["numel"] for tensor in document["tensors"])
    ours = {"numel": numel, "equal": round(figures["unchanged_bitwise"] * numel)}
    ours |= {eps: round(share * numel) for eps, share in figures["unchanged_abs"].items()}
    theirs = {"numel": torch["numel"], "equal": torch["equal"], **torch["within"]}
    wrong = {key: (ours.get(key), count) for key, count in theirs.items() if ours.get(key) != count}
    for norm in ("delta_norm", "base_norm"):
        if not math.isclose(figures[norm], torch[norm], rel_tol=1e-9):
            wrong[norm] = (figures[norm], torch[norm])
    if wrong:
        raise SystemExit(f"ckptdiff and the torch diff disagree (ours, theirs): {wrong}")
    return f"all counts over {numel:,} coordinates equal the torch diff's, norms within 1e-9"


def mask_sizes(run_file: Path, sample: int = 400) -> tuple[int, int]:
    """Bytes of sampled mask chunks as stored, and as zlib level 6 would store them."""
    import h5py

    stored = squeezed = 0
    with h5py.File(run_file) as file:
        masks = [mask for mask in file["masks"].values() if mask.size]
        for mask in random.Random(0).sample(masks, min(sample, len(masks))):
            chunk = random.Random(mask.size).randrange(mask.id.get_num_chunks())
            info = mask.id.get_chunk_info(chunk)
            stored += info.size
            begin = info.chunk_offset[0]
            squeezed += len(zlib.compress(mask[begin : begin + mask.chunks[0]].tobytes(), 6))
    return stored, squeezed


def main_pair(bench: Bench) -> Section:
    """Whole commands, engine and peers on the bf16 pair, in turns."""
    pair = bench.pair(bench.size)
    size = nbytes(pair)
    has_torch = importlib.util.find_spec("torch") is not None
    kept = bench.scratch / "kept.h5"
    sequential_read(files(pair))
    diff(bench, pair)  # compiles, if the level is new here
    runs: dict[str, list[Run]] = {"ckptdiff, masks": [], "ckptdiff --mask none": [], "torch diff": [], "cmp -l": []}
    for turn in range(bench.rounds):
        runs["ckptdiff, masks"].append(diff(bench, pair, keep=kept))
        runs["ckptdiff --mask none"].append(diff(bench, pair, "none"))
        if turn < bench.peer_rounds:
            runs["cmp -l"].append(peer("cmp", pair))
            if has_torch:
                runs["torch diff"].append(peer("torch", pair))
    inside = in_process(bench, pair)
    whole = median(runs["ckptdiff, masks"])
    rows = [row(name, size, median(found), whole, peak(found)) for name, found in runs.items() if found]
    names = {"none": "engine in process, --mask none", "masks": "engine in process, masks", "read_limit": "read limit"}
    rows += [row(label, size, inside[name], whole) for name, label in names.items()]
    stored, squeezed = mask_sizes(kept)
    kept.unlink()
    targets = [
        Target("read limit / engine, --mask none", inside["read_limit"] / inside["none"], ">=", 0.25),
        Target("read limit / engine, masks", inside["read_limit"] / inside["masks"], ">=", 0.15),
        Target("peak MB, masks", peak(runs["ckptdiff, masks"]) / 1e6, "<=", MEMORY_LIMIT / 1e6),
        Target("mask bytes / zlib level 6", stored / squeezed, "<=", 1.0),
    ]
    if not has_torch:
        notes = ["torch diff left out, and with it the check of equality: pip install torch==2.13.0"]
    else:
        targets.insert(0, Target("torch diff / ckptdiff, masks", median(runs["torch diff"]) / whole, ">=", 8))
        exact = json.loads(peer("torch-float64", pair).output)
        notes = [check_equal(json.loads(runs["ckptdiff, masks"][0].output), exact)]
    return Section(f"bf16 pair, {size / 2**30:.3g} GiB on both sides, page cache warm", rows, targets, notes)


def dtypes(bench: Bench) -> Section:
    """The engine in process on pairs of wider dtypes."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for dtype in ("bf16", "fp32", "mixed"):
        pair = bench.pair(bench.size, dtype)
        size = nbytes(pair)
        sequential_read(files(pair))
        inside = in_process(bench, pair)
        for name in ("none", "masks", "read_limit"):
            rows.append(row(f"{dtype}, {name}", size, inside[name], inside["read_limit"]))
        rates[dtype] = size / inside["none"]
    targets = [
        Target(f"GB/s of {dtype} / bf16, --mask none", rates[dtype] / rates["bf16"], ">=", 0.5)
        for dtype in ("fp32", "mixed")
    ]
    return Section("engine in process by dtype (mixed: fp32 base, bf16 tuned)", rows, targets)


def tiny(bench: Bench) -> Section:
    """Very many small tensors against few large ones."""
    pairs = {
        "Llama-shaped": bench.pair(bench.size),
        f"{bench.tiny_size >> 16:,} tensors of 64 KiB": bench.pair(bench.tiny_size, tensors="tiny"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in pairs}
    for pair in pairs.values():
        sequential_read(files(pair))
        diff(bench, pair)
    for _ in range(bench.rounds):
        for name, pair in pairs.items():
            runs[name].append(diff(bench, pair, view="table"))
    each = [median(runs[name]) / nbytes(pair) for name, pair in pairs.items()]
    rows = [
        row(f"ckptdiff, masks, {name}", nbytes(pair), median(runs[name]), median(runs[name]), peak(runs[name]))
        for name, pair in pairs.items()
    ]
    small = list(runs.values())[1]
    return Section(
        "many small tensors",
        rows,
        [
            Target("time per byte, small / Llama-shaped", each[1] / each[0], "<=", 3),
            Target("peak MB, small tensors", peak(small) / 1e6, "<=", MEMORY_LIMIT / 1e6),
        ],
    )


def memory(bench: Bench) -> Section:
    """Peak resident memory, mapped pages included, over sizes."""
    rows = []
    targets = []
    for size in bench.memory_sizes:
        pair = bench.pair(size)
        found = diff(bench, pair)
        name = f"{size / 2**30:.3g} GiB a side"
        rows.append(row(name, nbytes(pair), found.seconds, found.seconds, found.peak_rss))
        targets.append(Target(f"peak MB, {name}", found.peak_rss / 1e6, "<=", MEMORY_LIMIT / 1e6))
    return Section("memory, ckptdiff with masks", rows, targets)


def startup(bench: Bench) -> Section:
    """How long nothing takes: --help, a fixture with the compile cache warm, and with it empty."""
    pair = (FIXTURE / "base", FIXTURE / "tuned")
    diff(bench, pair)
    shown = [ckptdiff("--help") for _ in range(2 * bench.rounds + 1)]
    warm = [diff(bench, pair) for _ in range(bench.rounds)]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as cache:
        empty = ckptdiff("diff", *pair, "--no-progress", env={"CKPTDIFF_CACHE_DIR": cache})
    rows: list[dict[str, Any]] = [
        {"what": "ckptdiff --help", "seconds": median(shown), "peak MB": peak(shown) / 1e6},
        {"what": "diff of a fixture, warm", "seconds": median(warm), "peak MB": peak(warm) / 1e6},
        {"what": "diff of a fixture, empty cache", "seconds": empty.seconds, "peak MB": empty.peak_rss / 1e6},
    ]
    limits = (0.2, 1.5, 15.0)
    targets = [
        Target(f"seconds, {line['what']}", line["seconds"], "<=", limit)
        for line, limit in zip(rows, limits, strict=True)
    ]
    return Section("start-up", rows, targets)


def cold(bench: Bench) -> Section:
    """Files that are not in the page cache, against a plain sequential read of them."""
    pair = bench.pair(bench.size)
    size = nbytes(pair)
    sequential_read(files(pair))
    warm = diff(bench, pair).seconds
    reads: list[float] = []
    runs: list[Run] = []
    for _ in range(min(bench.rounds, 3)):
        drop_cache(files(pair))
        reads.append(sequential_read(files(pair)))
        drop_cache(files(pair))
        runs.append(diff(bench, pair))
    read = statistics.median(reads)
    rows = [
        row("sequential read of the disk", size, read, read),
        row("ckptdiff, masks, files cold", size, median(runs), read, peak(runs)),
        row("ckptdiff, masks, files cached", size, warm, read),
    ]
    targets = []
    if read > warm:
        targets.append(Target("disk's read rate / rate of ckptdiff, cold", median(runs) / read, "<=", 1.1))
    return Section("cold files", rows, targets, [] if targets else ["the disk is faster than the diff here"])


def stages(bench: Bench) -> Section:
    """What each stage of the kernel costs, by `stages.py`, which prints {stage: [seconds, ...]}."""
    pair = bench.pair(bench.size)
    sequential_read(files(pair))
    found = json.loads(run([sys.executable, HERE / "stages.py", *pair, "--rounds", str(bench.rounds)]).output)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    total = max(medians.values())
    return Section("stages", [row(name, nbytes(pair), seconds, total) for name, seconds in medians.items()])


SECTIONS = {
    "main": main_pair,
    "dtypes": dtypes,
    "tiny": tiny,
    "memory": memory,
    "startup": startup,
    "cold": cold,
    "stages": stages,
}


def names(text: str) -> Sequence[str]:
    """Section names in a comma-separated list."""
    found = text.split(",")
    unknown = [name for name in found if name not in SECTIONS]
    if unknown:
        raise SystemExit(f"no such section: {', '.join(unknown)} (there are {', '.join(SECTIONS)})")
    return found
