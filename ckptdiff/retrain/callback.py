"""Train masked coordinates inside transformers' ``Trainer``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from transformers import TrainerCallback

from ckptdiff.retrain.freezing import Freezing, freeze_outside
from ckptdiff.retrain.load import find_masks
from ckptdiff.retrain.parameters import ParameterMasks
from ckptdiff.runfile.reader import RunFile

logger = logging.getLogger("ckptdiff.retrain")


class MaskCallback(TrainerCallback):  # type: ignore[misc]
    """Train the masked coordinates of a run file, and keep every bit of the others.

    Gradients are masked before the trainer clips them. What keeps the rest as it is ends with the training; after one
    that an exception ended, :meth:`remove` ends it. How masks and parameters matched is logged at the start, by
    ``ckptdiff.retrain``: as a warning where something is left out.

    Parameters
    ----------
    run_file : path-like
    change : callable, optional
        Turns the masks that were loaded into those to use, such as ``lambda masks: masks.random(0)``.
    strict, names
        As for :func:`~ckptdiff.retrain.load_masks`.

    Examples
    --------
    >>> from ckptdiff.retrain import MaskCallback
    >>> callback = MaskCallback("run.h5", change=lambda masks: masks.random(0))
    >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        run_file: str | os.PathLike[str],
        *,
        change: Callable[[ParameterMasks], ParameterMasks] | None = None,
        strict: bool = True,
        names: Literal["base", "tuned"] = "base",
    ) -> None:
        self._run_file = run_file
        self._change = change
        self._strict = strict
        self._names: Literal["base", "tuned"] = names
        self._freezing: Freezing | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the masks and put the hooks in place, before the first batch."""
        self.remove()  # of a training that was interrupted
        with RunFile(self._run_file) as run:
            masks = find_masks(run, kwargs["model"], self._strict, self._names)
        if getattr(state, "is_world_process_zero", True):
            logger.log(logging.INFO if masks.report.whole else logging.WARNING, "%s: %s", self._run_file, masks.report)
        if self._change is not None:
            masks = self._change(masks)
        # Accelerate wraps the optimizer; its hooks belong to the one inside.
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self._freezing = freeze_outside(optimizer, masks)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        self.remove()

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        if self._freezing is not None:
            self._freezing.remove()
            self._freezing = None
