"""``ckptdiff diff``: compare two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptdiff.cli.display import progress
from ckptdiff.cli.inputs import (
    device_options,
    engine_options,
    progress_option,
    quick_option,
    resource_options,
    resume_option,
    stream_option,
    tensor_options,
)
from ckptdiff.cli.target import ReportTarget, abandon_stdout, files_of
from ckptdiff.cli.view import Request, verdict_verbosity, view_options
from ckptdiff.errors import OptionError, plural
from ckptdiff.remote.uploading import written_to
from ckptdiff.report.text import binary_size, dumps, safe, size

if TYPE_CHECKING:
    from ckptdiff.cluster.on_ray import ClusterPlan
    from ckptdiff.events import Event, Listener
    from ckptdiff.options import Options
    from ckptdiff.report.as_ndjson import NdjsonStream
    from ckptdiff.run.planning import Plan


@click.command(short_help="Compare two checkpoints; keep figures and masks in a run file.")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="RUN.h5",
    show_default="no run file: statistics only",
    help="Keep figures, histograms and update masks in this HDF5 file, or in an object such as s3://bucket/run.h5.",
)
@click.option("--title", metavar="TEXT", show_default="none", help="A title for the run file.")
@click.option(
    "--compare",
    type=click.Choice(["bf16", "stored"]),
    default="bf16",
    help="Cast floating values to bfloat16 first, or compare them as stored.",
)
@click.option(
    "--values",
    type=click.Choice(["model", "codes"]),
    default="model",
    help="Of quantised weights compare the values that the model uses, codes times scales, or codes and scales as they "
    "are stored.",
)
@click.option(
    "--mask",
    metavar="RULE",
    default="abs:1e-05",
    help="Which coordinates belong to the mask: bitwise, abs:EPS, eta:ETA, rel:TAU, top:PERCENT or none.",
)
@tensor_options
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=REGEX",
    show_default="none",
    help="Report tensors whose name matches as a group of their own (--by group). Repeatable.",
)
@device_options
@resource_options
@engine_options
@click.option(
    "--io",
    type=click.Choice(["auto", "mmap", "pread"]),
    default="auto",
    help="How to read: mmap maps the files, and a page that is lost under it (a file cut short, a failing disk or "
    "network) kills the process with SIGBUS; pread copies, and reports the same as an error. auto takes pread, "
    "which is also the faster one.",
)
@click.option(
    "--spectra",
    type=click.Choice(["randomized", "exact"]),
    show_default="none",
    help="Measure singular values of every matrix's update, and where it lies in the base: quickly with a bound on "
    "the error, or all of them in float64. Needs SciPy.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the randomized spectra.")
@resume_option
@stream_option
@quick_option
@click.option("--dry-run", is_flag=True, show_default="off", help="Print the plan and its memory, and read no data.")
@view_options
@progress_option
@verdict_verbosity
def diff(base: str, tuned: str, **given: Any) -> int:
    """Compare two checkpoints, BASE and TUNED.

    Each is a .safetensors file, a folder of shards, an index, or what torch saved: a zip file, a folder of such files,
    or one of torch.distributed.checkpoint; a URL (https, s3, gs, az), or a model of the Hugging Face hub such as
    org/name@revision. With -o the figures and one update mask per tensor are kept in a run file.

    \b
      ckptdiff diff base/ tuned/ -o run.h5
      ckptdiff diff base/ tuned/ --format json | jq .global.rel_norm
      ckptdiff diff base/ tuned/ --fail-if 'global.unchanged_bitwise<0.5'
    """  # noqa: D301
    with written_to(given["out"], given["resume"]) as out:
        kept = [*files_of(base), *files_of(tuned), *([] if out is None else [out])]
        request = Request.of(given, run_file=given["out"], kept=kept)
        options = _options(given)
        from ckptdiff.options import ray_options

        on_ray = ray_options(given["engine"], given["ray_address"], given["parallel"], given["ray_env"])
        if given["dry_run"]:
            if request.format not in ("table", "json"):
                raise OptionError(
                    "--dry-run prints text or json", expected="--format table or json", found=request.format
                )
            from ckptdiff.run.engine import planned

            with progress(shown=given["progress"], quiet=request.quiet, verbose=given["verbose"]) as tell:
                _print_plan(*planned(base, tuned, out, options, on_ray, tell), request)
            return 0
        from ckptdiff.files.unfinished import SAVING
        from ckptdiff.run.engine import run

        streaming = _is_live(request, options)
        asked = {"title": given["title"], "saving": SAVING if given["resume"] else None, "on_ray": on_ray}
        with _listening(request, given, out, streaming) as tell:
            result = run(base, tuned, out=out, options=options, listener=tell, **asked)
        if not streaming:
            with _reader_may_leave(out):
                request.print(result)
        return request.verdict(result)


def _options(given: dict[str, Any]) -> Options:
    from ckptdiff.options import MaskRule, Options, SpectraOptions

    return Options(
        compare=given["compare"],
        values=given["values"],
        mask=MaskRule.parse(given["mask"]),
        renames=given["renames"],
        include=given["include"],
        exclude=given["exclude"],
        groups=given["groups"],
        device=given["device"],
        threads=given["threads"],
        max_memory=given["max_memory"],
        gpu_memory=given["gpu_memory"],
        io=given["io"],
        spectra=SpectraOptions(given["spectra"], seed=given["seed"]) if given["spectra"] else None,
        stream=given["stream"],
        quick=given["quick"],
    )


def _is_live(request: Request, options: Options) -> bool:
    """Whether the report is written line by line, as figures come."""
    from ckptdiff.report.as_ndjson import streams

    return request.format == "ndjson" and streams(request.view) and not request.silent and not options.spectra


@contextmanager
def _listening(request: Request, given: dict[str, Any], out: Path | None, streaming: bool) -> Iterator[Listener]:
    """Show what a run tells, and write the report meanwhile if it is `streaming`."""
    from ckptdiff.events import Started

    def begins(event: Event) -> None:
        """End the run as it begins if a check names a member that does not exist; make ready while threads work."""
        if isinstance(event, Started):
            for check in request.checks:
                check.require_member(event.diff.tensors)
            if not request.silent:
                request.load_report()

    with ExitStack() as stack:
        listeners: list[Listener] = [begins]
        if streaming:
            listeners.append(stack.enter_context(_LiveReport(request.target, out)))
        repeated = request.format == "table" and request.target.is_stdout
        # A terminal that is given the report line by line has no room for anything else.
        shown = given["progress"] and not (streaming and request.target.is_terminal)
        how = {"shown": shown, "quiet": request.quiet, "verbose": given["verbose"], "repeated": repeated}
        yield stack.enter_context(progress(*listeners, **how))


@contextmanager
def _reader_may_leave(out: Path | None) -> Iterator[None]:
    """Go on without a reader of the report if there is a run file, which is what was asked for."""
    try:
        yield
    except BrokenPipeError:
        if out is None:
            raise
        abandon_stdout()


def _print_plan(plan: Plan, spread: ClusterPlan | None, request: Request) -> None:
    """Print the plan of a run as text or, with ``--format json``, as one object (schema "ckptdiff.plan/1")."""
    from ckptdiff.report.coverage_lines import coverage_lines

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
        "device": plan.device.name,
        "projected_gpu_memory": plan.projected_gpu_memory,
        "gpu_memory": plan.device.gpu_memory,
        "spectra": None if plan.spectra is None else asdict(plan.spectra),
        "ray": None if spread is None else asdict(spread),
    }
    if request.silent:
        return
    with request.target.open() as stream:
        if request.format == "json":
            coverage = {side: found.as_json() for side, found in plan.diff.coverage.items()}
            found = {"counts": plan.diff.counts, "coverage": coverage, "warnings": list(plan.diff.warnings)}
            stream.write(dumps({"schema": "ckptdiff.plan/1", **figures, **found}) + "\n")
            return
        counts = plan.diff.counts
        left_out = ", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key != "matched")
        lines = [
            f"compare   {plural(plan.tensors, 'tensor')} ({left_out})",
            *coverage_lines(plan.diff),
            f"read      {size(plan.total_bytes)} by {plan.io}",
            f"threads   {plan.threads}, chunks of {binary_size(plan.chunk_bytes)}",
            f"memory    {binary_size(plan.projected_memory)} at most, of {binary_size(plan.max_memory)} allowed",
        ]
        if plan.device.gpu_memory:
            lines.append(_on_gpu(plan.device.name, plan.projected_gpu_memory, plan.device.gpu_memory))
        if plan.spectra is not None:
            too_large = (
                f", {plan.spectra.too_large:,} of them too large for this memory" if plan.spectra.too_large else ""
            )
            matrices = plural(plan.spectra.matrices, "matrix", "matrices")
            lines.append(f"spectra   {plan.spectra.mode}, of {matrices}{too_large}")
            if plan.spectra.gpu_memory:
                spectra = plan.spectra
                lines.append(_on_gpu(spectra.device, spectra.projected_gpu_memory, spectra.gpu_memory))
        if spread is not None:
            each = f"{plural(spread.task_threads, 'thread')} and {binary_size(spread.task_memory)} each"
            tasks = f"{plural(spread.tasks, 'task')} of {binary_size(spread.task_bytes)}"
            lines.append(f"ray       {plural(spread.nodes, 'node')}, {tasks}, {spread.at_once} at once, {each}")
        lines += [f"note      {note}" for note in (plan.threads_note, plan.decoding_note) if note]
        lines += [f"warning: {safe(warning)}" for warning in plan.diff.warnings]
        stream.write("\n".join(lines) + "\n")


def _on_gpu(name: str, projected: int, allowed: int) -> str:
    return f"          on {name}, {binary_size(projected)} of its memory at most, of {binary_size(allowed)} allowed"


class _LiveReport:
    """A listener that writes each line of the ndjson report as soon as it is known; silent once its reader has left."""

    def __init__(self, target: ReportTarget, out: Path | None) -> None:
        self._target, self._out = target, out
        self._open = ExitStack()
        self._lines: NdjsonStream | None = None

    def __enter__(self) -> _LiveReport:
        from ckptdiff.report.as_ndjson import NdjsonStream

        self._lines = NdjsonStream(self._open.enter_context(self._target.open()))
        return self

    def __exit__(self, *raised: Any) -> None:
        with _reader_may_leave(self._out):
            self._open.__exit__(*raised)

    def __call__(self, event: Event) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            with _reader_may_leave(self._out):
                lines(event)
                self._lines = lines
