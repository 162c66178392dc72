"""Whole commands with spectra: a language model, many tiny matrices, a huge embedding; for `spectra.py`."""

from __future__ import annotations

import json
import statistics

from harness import Section, Target, ckptdiff, nbytes
from make_pair import make_pair
from spectra_settings import Settings
from spectrum_matrices import write_embedding


def whole_pair(settings: Settings) -> Section:
    """A whole diff with randomized spectra of a Llama-shaped pair."""
    folder = settings.folder / "pair"
    make_pair(settings.pair_size, folder, shape=settings.pair_shape)
    sides = folder / "base", folder / "tuned"
    runs = [
        ckptdiff("diff", *sides, "--spectra", "randomized", "--no-progress", "--format", "json")
        for _ in range(settings.exact_rounds)
    ]
    found = json.loads(runs[-1].output)
    seconds = statistics.median(run.seconds for run in runs)
    rows = [
        {
            "what": "ckptdiff diff --spectra randomized",
            "seconds": seconds,
            "peak MB": max(run.peak_rss for run in runs) / 1e6,
        }
    ]
    matrices = found["median_2d"]["spectral"]["matrices"]
    title = f"a pair of {nbytes(sides) / 2e9:.2f} GB a side, {found['counts']['matched']} tensors, {matrices} matrices"
    return Section(title, rows, [Target("seconds", seconds, "<=", 30)])


def tiny(settings: Settings) -> Section:
    """A whole diff with randomized spectra of very many small matrices."""
    folder = settings.folder / "tiny"
    make_pair(settings.tiny_size, folder, tensors="tiny")
    found = ckptdiff(
        "diff", folder / "base", folder / "tuned", "--spectra", "randomized", "--no-progress", "--format", "json"
    )
    matrices = json.loads(found.output)["median_2d"]["spectral"]["matrices"]
    row = {"what": f"{matrices} matrices of 64 KiB", "seconds": found.seconds, "peak MB": found.peak_rss / 1e6}
    return Section("many tiny matrices", [row])


def memory(settings: Settings) -> Section:
    """Peak memory over an embedding far larger than it."""
    rows, columns = settings.embedding
    sides = [settings.folder / f"{side}.safetensors" for side in ("base", "tuned")]
    write_embedding(sides, rows, columns)
    found = ckptdiff("diff", *sides, "--spectra", "randomized", "--no-progress", "--format", "json")
    row = {"what": f"{rows} x {columns}, bf16", "seconds": found.seconds, "peak MB": found.peak_rss / 1e6}
    method = json.loads(found.output)["tensors"][0]["spectral"]["method"]
    if method != "randomized":
        raise SystemExit(f"the embedding was not measured: {method}")
    return Section("memory", [row], [Target("peak MB", found.peak_rss / 1e6, "<=", 1000)])
