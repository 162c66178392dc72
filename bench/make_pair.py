"""Write a synthetic checkpoint pair of a given size, shaped and named as a language model.

    python bench/make_pair.py 2GiB /tmp/pair              # bf16, Llama-shaped
    python bench/make_pair.py 1875MiB /tmp/tiny --tensors tiny   # 30,000 tensors of 64 KiB
    python bench/make_pair.py 2GiB /tmp/mixed --dtype mixed      # fp32 base, bf16 tuned
    python bench/make_pair.py 16GiB /dev/shm/pair --processes 12 # several shards at a time, the same bytes

OUT/base and OUT/tuned each get several shards and an index. SIZE is the base side's data. Weights are
normal * 0.02. `--changed` of the coordinates (none in norms) move by 1 to 4 bf16 steps in either direction,
independently: the hardest mask to compress at that density. Masters in fp32 lie off the bf16 grid, and every
one of them also moves by less than 3 % of a bf16 step, as fp32 training does.

Random numbers come from tiles that are cut at random places and rescaled for each chunk, so that a pair is
written at disk speed and yet no stretch of weights repeats. Each shard draws its cuts from a seed of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 18
TILE = (1 << 23) + 9973
UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
ITEMSIZE = {"BF16": 2, "F32": 4}
SIDES = {"bf16": ("BF16", "BF16"), "fp32": ("F32", "F32"), "mixed": ("F32", "BF16")}
STEPS = np.array([1, -1, 2, -2, 3, -3, 4, -4], np.int32)
STEP_ODDS = np.array([30, 30, 11, 11, 5, 5, 4, 4]) / 100
JITTER = 2000

U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write; `moves` is false for a tensor that the update leaves alone."""

    name: str
    shape: tuple[int, ...]
    center: float = 0.0
    moves: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parse_size(text: str) -> int:
    """Bytes in "64MiB", "2GiB", "1.5 GB" or "4096"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (write 64MiB, 2GiB, ...)")
    return int(float(match[1]) * UNITS[match[2].upper()])


def llama_entries(numel: int, shape: tuple[int, int] | None = None) -> list[Entry]:
    """Tensors of a Llama of `numel` values; the vocabulary takes up what whole layers leave.

    `shape` is (hidden size, layers); otherwise it is the widest model that leaves room for four layers.
    """
    for hidden in (8192, 4096, 3072, 2048, 1024, 512, 256, 128, 64, 32, 16):
        ffn = -(-hidden * 8 // 3 // 32) * 32
        kv = max(hidden // 4, 16)
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
        vocab = min(hidden * 8, 32000)
        layers = (numel - 2 * vocab * hidden - hidden) // layer
        if shape is not None and hidden == shape[0] and layers >= shape[1]:
            layers = shape[1]
            break
        if shape is None and layers >= 4:
            break
    else:
        raise SystemExit(f"a Llama-shaped pair needs more than {numel} values a side")
    vocab += (numel - 2 * vocab * hidden - hidden - layers * layer) // (2 * hidden)
    found = [Entry("model.embed_tokens.weight", (vocab, hidden))]
    for i in range(layers):
        at = f"model.layers.{i}."
        found += [
            Entry(at + "input_layernorm.weight", (hidden,), 1.0, False),
            Entry(at + "self_attn.q_proj.weight", (hidden, hidden)),
            Entry(at + "self_attn.k_proj.weight", (kv, hidden)),
            Entry(at + "self_attn.v_proj.weight", (kv, hidden)),
            Entry(at + "self_attn.o_proj.weight", (hidden, hidden)),
            Entry(at + "post_attention_layernorm.weight", (hidden,), 1.0, False),
            Entry(at + "mlp.gate_proj.weight", (ffn, hidden)),
            Entry(at + "mlp.up_proj.weight", (ffn, hidden)),
            Entry(at + "mlp.down_proj.weight", (hidden, ffn)),
        ]
    found.append(Entry("model.norm.weight", (hidden,), 1.0, False))
    return [*found, Entry("lm_head.weight", (vocab, hidden))]


def tiny_entries(numel: int, itemsize: int, tensor_bytes: int = 65536) -> list[Entry]:
    """Per-expert tensors of 64 KiB each or of another multiple of 1 KiB, 64 experts a layer."""
    each = tensor_bytes // itemsize
    names = (
        f"model.layers.{i // 192}.mlp.experts.{i // 3 % 64}.{('gate', 'up', 'down')[i % 3]}_proj.weight"
        for i in range(max(1, numel // each))
    )
    return [Entry(name, (each // 256, 256)) for name in names]


def split_shards(entries: Sequence[Entry], count: int) -> list[list[Entry]]:
    """Cut the entries, in order, into at most `count` shards of about equal size."""
    total = sum(entry.numel for entry in entries)
    shards: list[list[Entry]] = [[]]
    done = 0
    for entry in entries:
        if shards[-1] and done >= total * len(shards) / count:
            shards.append([])
        shards[-1].append(entry)
        done += entry.numel
    return shards


def header(entries: Sequence[Entry], dtype: str) -> bytes:
    """Safetensors header of one shard, padded with spaces to a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        stop = at + entry.numel * ITEMSIZE[dtype]
        fields[entry.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_bf16(bits: U32) -> npt.NDArray[np.uint16]:
    """Round finite float32 bit patterns to bf16, to nearest, ties to even."""
    odd = bits >> 16
    odd &= 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


class Weights:
    """An endless supply of base and tuned values, cut from seeded tiles."""

    def __init__(self, seed: int, changed: float, dtype: str) -> None:
        self.seed = seed
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.sides = SIDES[dtype]
        tile = self.rng.standard_normal(TILE, dtype=np.float32)
        # A step must not carry a weight through zero into a NaN pattern.
        np.copyto(tile, np.float32(1e-5), where=np.abs(tile) < 1e-5)
        self.normal = tile
        moved = self.rng.random(TILE, dtype=np.float32) < changed
        steps = np.zeros(TILE, np.int32)
        steps[moved] = self.rng.choice(STEPS, int(moved.sum()), p=STEP_ODDS)
        if dtype == "bf16":
            self.moves: npt.NDArray[np.uint16] | U32 = steps.astype(np.int16).view(np.uint16)
        else:
            jitter = self.rng.integers(-JITTER, JITTER, TILE, dtype=np.int32, endpoint=True)
            self.moves = ((steps << 16) + jitter).view(np.uint32)

    def begin_shard(self, number: int) -> None:
        """Draw from here on what belongs to a shard, whatever was drawn before."""
        self.rng = np.random.Generator(np.random.SFC64([self.seed, number]))

    def chunks(self, entry: Entry) -> Iterator[tuple[bytes | memoryview, bytes | memoryview]]:
        """Yield the bytes of both sides of a tensor, a chunk at a time."""
        for start in range(0, entry.numel, CHUNK):
            count = min(CHUNK, entry.numel - start)
            cut, move_cut = (int(k) for k in self.rng.integers(0, TILE - count, 2, endpoint=True))
            scale = np.float32(0.02 * self.rng.uniform(0.8, 1.25))
            values = self.normal[cut : cut + count] * scale
            if entry.center:
                values += np.float32(entry.center)
            bits = values.view(np.uint32)
            moves = self.moves[move_cut : move_cut + count]
            if self.sides[0] == "BF16":
                base16 = to_bf16(bits)
                yield base16.data, ((base16 + moves).data if entry.moves else base16.data)
                continue
            tuned = bits + moves if entry.moves else bits
            yield bits.data, (tuned.data if self.sides[1] == "F32" else to_bf16(tuned).data)


def write_shard(files: tuple[BinaryIO, BinaryIO], entries: Sequence[Entry], weights: Weights) -> None:
    """Write one shard of both sides at once."""
    for file, dtype in zip(files, weights.sides, strict=True):
        file.write(header(entries, dtype))
    for entry in entries:
        for sides in weights.chunks(entry):
            for file, data in zip(files, sides, strict=True):
                file.write(data)


def make_pair(
    size: int,
    out: Path,
    dtype: str = "bf16",
    tensors: str = "llama",
    seed: int = 0,
    changed: float = 0.1,
    shape: tuple[int, int] | None = None,
    tensor_bytes: int = 65536,
    processes: int = 1,
) -> int:
    """Write the pair to `out/base` and `out/tuned`; return the bytes of tensor data on both sides.

    `shape` is as for :func:`llama_entries`, `tensor_bytes` as for :func:`tiny_entries`. The pair is the same for any
    number of processes.

    Raises
    ------
    SystemExit
        If a side's folder already holds files, or `size` is too small for the shape.
    """
    itemsize = ITEMSIZE[SIDES[dtype][0]]
    numel = size // itemsize
    entries = llama_entries(numel, shape) if tensors == "llama" else tiny_entries(numel, itemsize, tensor_bytes)
    folders = [out / "base", out / "tuned"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SystemExit(f"{folder} is not empty")
    weights = Weights(seed, changed, dtype)
    shards = split_shards(entries, max(3, -(-size // (2 << 30))))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write(number: int) -> None:
        weights.begin_shard(number)
        with (folders[0] / names[number]).open("wb") as base, (folders[1] / names[number]).open("wb") as tuned:
            write_shard((base, tuned), shards[number], weights)

    if processes == 1:
        for number in range(len(shards)):
            write(number)
    else:
        _forked(write, len(shards), processes)
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    numel = sum(entry.numel for entry in entries)
    for folder, side in zip(folders, weights.sides, strict=True):
        index = {"metadata": {"total_size": numel * ITEMSIZE[side]}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return numel * sum(ITEMSIZE[side] for side in weights.sides)


def _forked(write: Callable[[int], None], shards: int, processes: int) -> None:
    """Write shards in processes that share the tiles of this one."""
    context = multiprocessing.get_context("fork")

    def take_turns(first: int) -> None:
        for number in range(first, shards, processes):
            write(number)

    running = [context.Process(target=take_turns, args=(first,)) for first in range(min(processes, shards))]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise SystemExit(f"writing shards ended with {[process.exitcode for process in running]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint pair of a given size.")
    parser.add_argument("size", type=parse_size, help="data of the base side: 64MiB, 2GiB, ...")
    parser.add_argument("out", type=Path, help="folder that gets base/ and tuned/")
    parser.add_argument("--dtype", choices=SIDES, default="bf16", help="mixed: fp32 base, bf16 tuned")
    parser.add_argument("--tensors", choices=("llama", "tiny"), default="llama", help="tiny: 64 KiB each")
    parser.add_argument("--tensor-bytes", type=parse_size, default=65536, help="of each tiny tensor, another size")
    parser.add_argument("--processes", type=int, default=1, help="write so many shards at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changed", type=float, default=0.1, help="share of coordinates moved")
    options = parser.parse_args(argv)
    begun = time.perf_counter()
    written = make_pair(**vars(options))
    took = time.perf_counter() - begun
    print(f"{written / 1e6:.0f} MB in {took:.1f} s, {written / 1e6 / took:.0f} MB/s", file=sys.stderr)


if __name__ == "__main__":
    main()
