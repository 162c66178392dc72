"""``ckptdiff diff --dry-run``: what a run would read, and the memory it would take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptdiff.cli.view import Request
from ckptdiff.errors import OptionError, plural
from ckptdiff.report.json_text import dumps
from ckptdiff.report.text import binary_size, safe, size

if TYPE_CHECKING:
    from ckptdiff.events import Listener
    from ckptdiff.options import Options


def print_plan(base: str, tuned: str, out: Path | None, options: Options, request: Request, tell: Listener) -> None:
    """Print the plan of a run as text or, with ``--format json``, as one object (schema "ckptdiff.plan/1")."""
    from ckptdiff.run.engine import prepare

    if request.format not in ("table", "json"):
        raise OptionError("--dry-run prints text or json", expected="--format table or json", found=request.format)
    plan = prepare(base, tuned, out=out, options=options, tell=tell, read_data=False)
    for check in request.checks:
        check.require_member(plan.diff.tensors)
    figures: dict[str, Any] = {
        "tensors": plan.tensors,
        "total_bytes": plan.total_bytes,
        "io": plan.io,
        "threads": plan.threads,
        "chunk_bytes": plan.chunk_bytes,
        "projected_memory": plan.projected_memory,
        "max_memory": plan.max_memory,
        "spectra": None if plan.spectra is None else asdict(plan.spectra),
    }
    if request.silent:
        return
    with request.target.open() as stream:
        if request.format == "json":
            found = {"counts": plan.diff.counts, "warnings": list(plan.diff.warnings)}
            stream.write(dumps({"schema": "ckptdiff.plan/1", **figures, **found}) + "\n")
            return
        counts = plan.diff.counts
        left_out = ", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key != "matched")
        lines = [
            f"compare   {plural(plan.tensors, 'tensor')} ({left_out})",
            f"read      {size(plan.total_bytes)} by {plan.io}",
            f"threads   {plan.threads}, chunks of {binary_size(plan.chunk_bytes)}",
            f"memory    {binary_size(plan.projected_memory)} at most, of {binary_size(plan.max_memory)} allowed",
        ]
        if plan.spectra is not None:
            too_large = (
                f", {plan.spectra.too_large:,} of them too large for this memory" if plan.spectra.too_large else ""
            )
            matrices = plural(plan.spectra.matrices, "matrix", "matrices")
            lines.append(f"spectra   {plan.spectra.mode}, of {matrices}{too_large}")
        if plan.threads_note:
            lines.append(f"note      {plan.threads_note}")
        lines += [f"warning: {safe(warning)}" for warning in plan.diff.warnings]
        stream.write("\n".join(lines) + "\n")
