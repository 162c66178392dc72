"""What the sections of `compare.py` share: pairs on disk, commands to run on them, and lines of a report."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_pair import make_pair
from measure import Run, run, table

HERE = Path(__file__).parent
Pair = tuple[Path, Path]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that has to be reached, and whether it was."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit

    def row(self) -> dict[str, Any]:
        bound = f"{self.relation} {self.limit:g}"
        return {"target": self.name, "value": self.value, "must be": bound, "": "ok" if self.met else "MISSED"}


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the report."""

    title: str
    rows: list[dict[str, Any]]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def show(section: Section) -> None:
    """Print a section."""
    print(table(section.title, section.rows))
    if section.targets:
        print(table("", [target.row() for target in section.targets]))
    for note in section.notes:
        print(f"  {note}")
    print(flush=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """What to measure with: folders, sizes in bytes, rounds."""

    pairs: Path
    scratch: Path
    size: int
    tiny_size: int
    memory_sizes: tuple[int, ...]
    rounds: int
    peer_rounds: int

    def pair(self, size: int, dtype: str = "bf16", tensors: str = "llama") -> Pair:
        """Make a synthetic pair, or find the one made before."""
        folder = self.pairs / f"{tensors}-{dtype}-{size}"
        if not folder.exists():
            print(f"writing a pair of {size / 2**20:.0f} MiB a side ({dtype}, {tensors})", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=self.pairs) as unfinished:
                make_pair(size, Path(unfinished, "pair"), dtype, tensors)
                Path(unfinished, "pair").rename(folder)
        return folder / "base", folder / "tuned"


def files(pair: Pair) -> list[Path]:
    """Shards of both sides."""
    return [path for side in pair for path in sorted(side.glob("*.safetensors"))]


def nbytes(pair: Pair) -> int:
    """Bytes of both sides."""
    return sum(path.stat().st_size for path in files(pair))


def ckptdiff(*arguments: str | Path, env: dict[str, str] | None = None) -> Run:
    """The command as installed beside this Python."""
    return run([Path(sys.executable).with_name("ckptdiff"), *arguments], env)


def diff(bench: Bench, pair: Pair, mask: str | None = None, keep: Path | None = None, view: str = "json") -> Run:
    """One whole `ckptdiff diff`, with its masks in a run file, or with `--mask none` and no run file."""
    if mask is not None:
        return ckptdiff("diff", *pair, "--mask", mask, "--no-progress", "--format", "json")
    out = bench.scratch / "run.h5"
    out.unlink(missing_ok=True)
    found = ckptdiff("diff", *pair, "-o", out, "--no-progress", "--format", view)
    if keep is None:
        out.unlink()
    else:
        out.replace(keep)
    return found


def peer(name: str, pair: Pair) -> Run:
    """One run of a peer."""
    return run([sys.executable, HERE / "peers.py", name, *pair])


def in_process(bench: Bench, pair: Pair) -> dict[str, float]:
    """Median seconds of the read limit and of the engine, by `in_process.py`."""
    options = ["--rounds", str(bench.rounds), "--scratch", str(bench.scratch)]
    seconds = json.loads(run([sys.executable, HERE / "in_process.py", *pair, *options]).output)
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def row(name: str, size: int, seconds: float, reference: float, peak_rss: int | None = None) -> dict[str, Any]:
    """One line of a table; `reference` is what "times" is counted in."""
    return {
        "what": name,
        "seconds": seconds,
        "GB/s": size / 1e9 / seconds,
        "times": seconds / reference,
        "peak MB": None if peak_rss is None else peak_rss / 1e6,
    }
