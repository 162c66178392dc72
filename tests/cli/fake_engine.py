"""An engine without data: it plays the events of a synthetic Diff, and writes a real run file."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ckptdiff.events import Finished, Listener, Note, Started, TensorsDone, stage
from ckptdiff.figures.result import Diff
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.memory import DEFAULT_MEMORY
from ckptdiff.options import MaskRule, Options
from ckptdiff.runfile.schema import mask_chunk_bytes


@dataclass
class FakeEngine:
    diff: Diff
    pause: float = 0.0
    """Seconds between two tensors."""
    error: BaseException | None = None
    """Raised in the middle of the run."""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        base: str,
        tuned: str,
        *,
        out: Path | None = None,
        options: Options | None = None,
        listener: Listener | None = None,
        title: str | None = None,
        saving: object = None,
        on_ray: object = None,
    ) -> Diff:
        self.calls.append({"base": base, "tuned": tuned, "out": out, "options": options, "title": title})
        tell = listener or (lambda event: None)
        if out is None:
            self._play(tell)
        else:
            from ckptdiff.runfile.writer import RunFileWriter

            with RunFileWriter(out, rule=MaskRule.parse(self.diff.mask_rule), compare="bf16", title=title) as writer:
                self._play(tell)
                for facts, changed in zip(self.diff.tensors, self.diff.columns["changed"].tolist(), strict=True):
                    size = mask_chunk_bytes(math.prod(facts.shape))
                    if not size:
                        writer.begin_mask(facts.name, facts.shape)
                    for index in range(-(-math.prod(facts.shape) // (1 << 20))):
                        first = min(max(changed - (index << 20), 0), 1 << 20)
                        bits = (1 << first) - 1
                        writer.add_mask_chunks(facts.name, facts.shape, index, [(bits.to_bytes(size, "little"), 1)])
                writer.add_histograms(HistogramRows.empty(len(self.diff.tensors)))
                writer.finish(self.diff)
        tell(Finished(self.diff, 0.1))
        return self.diff

    def planned(
        self, base: str, tuned: str, out: Path | None, options: Options, on_ray: object, tell: Listener
    ) -> tuple[SimpleNamespace, None]:
        assert on_ray is None
        tell(Note("compiling kernels, once"))
        plan = SimpleNamespace(
            tensors=len(self.diff.tensors),
            total_bytes=2_000_000_000,
            threads=2,
            threads_note="",
            decoding_note="",
            spectra=None,
            chunk_bytes=1 << 21,
            device=SimpleNamespace(name="cpu", gpu_memory=0),
            projected_gpu_memory=0,
            projected_memory=300 << 20,
            max_memory=options.max_memory or DEFAULT_MEMORY,
            io="mmap",
            diff=self._cut(slice(0)),
        )
        return plan, None

    def _cut(self, rows: slice) -> Diff:
        return replace(self.diff, columns={name: values[rows] for name, values in self.diff.columns.items()})

    def _play(self, tell: Listener) -> None:
        tell(Started(len(self.diff.tensors), 1000, replace(self._cut(slice(0)), warnings=())))
        for warning in self.diff.warnings:
            tell(Note(warning, warning=True))
        tell(Note("reading with mmap"))
        with stage(tell, "comparing", 1000, "bytes") as told:
            for row, facts in enumerate(self.diff.tensors):
                if self.error is not None and row == len(self.diff.tensors) // 2:
                    raise self.error
                time.sleep(self.pause)
                one = slice(row, row + 1)
                tell(TensorsDone(row, replace(self._cut(one), tensors=self.diff.tensors[one])))
                told.at(1000 * (row + 1) // len(self.diff.tensors), facts.name, 10 * (row + 1), 7 * (row + 1))

    def modules(self) -> dict[str, ModuleType]:
        """What stands in the place of the engine, which a dry run asks for its plan."""
        engine = ModuleType("ckptdiff.run.engine")
        engine.run, engine.planned = self.run, self.planned
        return {engine.__name__: engine}


def install(engine: FakeEngine) -> None:
    """For subprocesses."""
    sys.modules.update(engine.modules())
