"""Follow the update of a training while transformers' ``Trainer`` runs it."""

from __future__ import annotations

import csv
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from transformers import TrainerCallback

from ckptdiff.options import Compare, as_tuple, check_threads
from ckptdiff.run.warm_up import python_command

_MAIN = "from ckptdiff.cli import main; sys.exit(main(sys.argv[1:]))"
_LOGGED = ("support_fraction", "union_fraction", "touched", "returned", "reverted", "churned", "rel_norm")

logger = logging.getLogger("ckptdiff.retrain")


@dataclass(frozen=True, slots=True)
class _Following:
    """A process that follows the checkpoints up to a step."""

    step: int
    process: subprocess.Popen[bytes]
    rows: IO[bytes]
    errors: IO[bytes]


class TrackCallback(TrainerCallback):  # type: ignore[misc]
    """At each save, log how the update of the training has grown, and which way it went.

    A process beside the training follows all checkpoints that are then in the output folder, as ``ckptdiff track
    --gram`` does. What it finds of the last one goes to ``trainer.log``, and so to whatever the trainer logs to, under
    ``track/``, at the step that the training has come to meanwhile; ``track/step`` is that of the checkpoint,
    ``track/checkpoints`` how many were followed. A save that comes while one process runs waits for it, and only the
    newest of those that wait is followed; the end of the training waits for the last. What cannot be followed is a
    warning of ``ckptdiff.retrain``, and the training goes on.

    Parameters
    ----------
    trainer : transformers.Trainer
        To which it is then added, by ``trainer.add_callback``.
    base : path-like
        The checkpoint that the training starts from.
    compare, include, exclude, gram
        As for :func:`~ckptdiff.track.track`.
    threads : int
        Of that process; 0 stands for one per available core.

    Raises
    ------
    OptionError
        A number of threads out of range, or a single string for several globs.

    Examples
    --------
    >>> from ckptdiff.retrain import TrackCallback
    >>> trainer.add_callback(TrackCallback(trainer, "base"))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Any,
        base: str | os.PathLike[str],
        *,
        compare: Compare = "bf16",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gram: bool = True,
        threads: int = 1,
    ) -> None:
        check_threads(threads)
        self._trainer, self._base = trainer, os.fspath(base)
        self._options = ["--compare", compare, "--threads", str(threads), *(["--gram"] if gram else [])]
        for name, globs in (("include", include), ("exclude", exclude)):
            self._options += [word for glob in as_tuple(name, globs) for word in (f"--{name}", glob)]
        self._running: _Following | None = None
        self._waiting: tuple[int, list[str]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a training that was interrupted."""
        self.close()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the checkpoints that are there now, or once the process that runs is through."""
        if state.is_world_process_zero:
            self._waiting = state.global_step, _checkpoints(Path(args.output_dir), state.global_step)
            self._go_on(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what a process has found meanwhile."""
        self._go_on(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for what has not been followed yet."""
        while self._running is not None or self._waiting is not None:
            if self._running is not None:
                self._running.process.wait()
            self._go_on(control)

    def close(self) -> None:
        """End the process, such as after a training that an exception ended; a second call does nothing."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.wait()
        self._running = self._waiting = None

    def _go_on(self, control: Any) -> None:
        """Take what a process has found if it is through, and start the next one if one waits."""
        if self._running is not None and self._running.process.poll() is not None:
            following, self._running = self._running, None
            figures = _found(following)
            if figures:
                due = control.should_log
                self._trainer.log(figures)
                control.should_log = due  # a log ends with having none due
        if self._running is None and self._waiting is not None:
            (step, checkpoints), self._waiting = self._waiting, None
            words = ["track", self._base, *checkpoints, *self._options, "--format", "csv", "--no-progress"]
            rows, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (the process writes them)
            command = [*python_command(_MAIN), *words]
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=rows, stderr=errors)
            except OSError as error:
                logger.warning("the checkpoints up to step %d were not followed: %s", step, error)
            else:
                self._running = _Following(step, process, rows, errors)


def _checkpoints(folder: Path, last: int) -> list[str]:
    """The checkpoints in an output folder, up to a step, in the order of their steps."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and int(step) <= last:
            found[int(step)] = str(path.absolute())
    return [found[step] for step in sorted(found)]


def _found(following: _Following) -> dict[str, float]:
    """What a process found of the last checkpoint; nothing, and a warning, if it failed."""
    with following.rows as rows, following.errors as errors:
        for stream in (rows, errors):
            stream.seek(0)
        said = errors.read().decode(errors="replace").strip()
        if following.process.returncode:
            logger.warning("the checkpoints up to step %d were not followed: %s", following.step, said)
            return {}
        if said:
            logger.info("%s", said)
        lines = list(csv.DictReader(rows.read().decode().splitlines()))
    last = lines[-1]
    measured = [key for key in last if key in _LOGGED or key.startswith(("step_", "rank1_", "line_"))]
    figures = {f"track/{key}": float(last[key]) for key in measured if last[key]}
    return {**figures, "track/step": following.step, "track/checkpoints": len(lines)}
