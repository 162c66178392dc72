"""Masks and histograms of tensors with awkward names and shapes, and the run files of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.figures.result import Diff
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.options import MaskRule
from ckptdiff.runfile.compress import compress_chunk
from ckptdiff.runfile.schema import MASK_CHUNK, mask_chunk_bytes
from ckptdiff.runfile.writer import RunFileWriter

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (512, 4096),
    "model.layers.0.self_attn.k_proj.weight": (65, 33_000),
    "one": (1,),
    "seven": (7,),
    "scalar": (),
    "empty": (0, 4),
    "sixty-five": (5, 13),
    "experts": (3, 5, 7),
    "a/b": (9,),
    ".": (8,),
    "..": (8,),
    "../../etc/passwd": (63,),
    "/absolute": (64,),
    "": (10,),
    "%": (11,),
    "50%2F": (12,),
    "nul\x00nul": (13,),
    "evil\x1b[31m\r\n\x7f": (14,),
    ".hidden": (15,),
    "\u202eübergröße\U0001f600": (16,),
}


@dataclass(frozen=True)
class Sample:
    """What a run file was made of."""

    path: Path
    diff: Diff
    masks: dict[str, np.ndarray]
    rows: list[HistogramRows]


def add_mask(writer: RunFileWriter, name: str, mask: np.ndarray) -> None:
    packed = np.packbits(mask.ravel(), bitorder="little")
    chunk = mask_chunk_bytes(mask.size)
    if not chunk:
        writer.begin_mask(name, mask.shape)
    for index in range(math.ceil(packed.size / MASK_CHUNK)):
        piece = packed[index * MASK_CHUNK : (index + 1) * MASK_CHUNK]
        writer.add_mask_chunks(name, mask.shape, index, [compress_chunk(piece, chunk)])


def random_rows(rng: np.random.Generator, count: int) -> HistogramRows:
    return HistogramRows(*(rng.integers(0, 1 << 40, (count, bins), dtype=np.uint64) for bins in (279, 279, 279, 64)))


def counted(diff: Diff, masks: dict[str, np.ndarray]) -> Diff:
    """The diff with `changed` as the masks have it."""
    changed = np.array([masks[tensor.name].sum() for tensor in diff.tensors], np.uint64)
    return replace(diff, columns={**diff.columns, "changed": changed})


def write(path: Path, diff: Diff, masks: dict[str, np.ndarray], rows: list[HistogramRows], **options: Any) -> None:
    rule = MaskRule.parse(diff.mask_rule)
    with RunFileWriter(path, rule=rule, compare=diff.compare, **options) as writer:
        for name, mask in masks.items():
            add_mask(writer, name, mask)
        for row in rows:
            writer.add_histograms(row)
        writer.finish(diff)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
