"""Define options that several commands share: which tensors, how much of the machine, and what to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Option = Callable[[Any], Any]


def size_in_bytes(_: click.Context, __: click.Parameter, text: str | None) -> int:
    """Callback of an option that takes a size: its bytes, 0 if it is not given."""
    from ckptdiff.options import parse_size

    return 0 if text is None else parse_size(text)


_TENSORS: Sequence[_Option] = (
    click.option(
        "--map",
        "renames",
        multiple=True,
        metavar="OLD=NEW",
        show_default="none",
        help="Regex substitution that turns names of BASE into names of TUNED. Repeatable.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        show_default="all",
        help="Compare only tensors whose name matches. Repeatable.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        show_default="none",
        help="Leave out tensors whose name matches. Repeatable.",
    ),
)
threads_option = click.option(
    "--threads", type=int, metavar="N", default=0, show_default="0, that is one per core", help="Worker threads."
)
_RESOURCES: Sequence[_Option] = (
    threads_option,
    click.option(
        "--max-memory",
        metavar="SIZE",
        callback=size_in_bytes,
        show_default="400M, or what all threads need if that is more, about 200M + 25M a thread; for randomized "
        "spectra 600M a thread, at least 1.2G, and for exact ones 2G a thread, at least 4G; none of them grows beyond "
        "half of the machine's memory",
        help="Bound on the peak memory of the whole process, mapped pages included. Fewer threads work if it does not "
        "hold all.",
    ),
)
progress_option = click.option(
    "--progress/--no-progress", default=True, help="Show progress on stderr: a bar on a terminal, else a line at times."
)

resume_option = click.option(
    "--resume",
    is_flag=True,
    show_default="off",
    help="Keep what is done in the folder RUN.h5.part until the run file is complete, and go on from what a stopped or "
    "killed run with the same inputs and options kept there.",
)
stream_option = click.option(
    "--stream",
    is_flag=True,
    show_default="off: they are downloaded into the cache",
    help="Read models of the Hugging Face hub where they are, and keep nothing of them on disk.",
)

quick_option = click.option(
    "--quick",
    is_flag=True,
    show_default="off",
    help="Leave unread what is known to be the same on both sides: tensors of one file, and of files that the hub "
    "gives the same hash, which are not downloaded either. What takes the base's values is undefined then.",
)

_ENGINE: Sequence[_Option] = (
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        help="Compute in this process, or on the nodes of a Ray cluster, each task with --threads and --max-memory.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        show_default="RAY_ADDRESS, a cluster that runs here, or else one that is started here",
        help="The cluster that --engine ray joins.",
    ),
    click.option(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        show_default="as many as there is room for",
        help="Tasks that --engine ray has under way at a time, at most.",
    ),
    click.option(
        "--ray-env",
        multiple=True,
        metavar="GLOB",
        show_default="none: nodes take credentials and endpoints from their own environment",
        help="Environment variables that the tasks of --engine ray get from this process: 'AWS_*', HF_TOKEN. "
        "Repeatable.",
    ),
)
_DEVICE: Sequence[_Option] = (
    click.option(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="Where to compute: cpu, cuda or cuda:N (a GPU), reference (the slow NumPy oracle), or auto: a GPU if one "
        "works, else the processor.",
    ),
    click.option(
        "--gpu-memory",
        metavar="SIZE",
        callback=size_in_bytes,
        show_default="half of what is free",
        help="Bound on the GPU memory that is taken.",
    ),
)


def device_options(command: _Command) -> _Command:
    """Add ``--device`` and ``--gpu-memory``."""
    return _with(_DEVICE, command)


def engine_options(command: _Command) -> _Command:
    """Add ``--engine``, ``--ray-address``, ``--parallel`` and ``--ray-env``."""
    return _with(_ENGINE, command)


def tensor_options(command: _Command) -> _Command:
    """Add ``--map``, ``--include`` and ``--exclude``."""
    return _with(_TENSORS, command)


def resource_options(command: _Command) -> _Command:
    """Add ``--threads`` and ``--max-memory``."""
    return _with(_RESOURCES, command)


def _with(options: Sequence[_Option], command: _Command) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command
