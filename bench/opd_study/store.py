"""Results by name, one JSON file each, so that a study can stop anywhere and go on later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class OutOfTimeError(Exception):
    """The time that was given is used up; what is there stays."""


class Store:
    """Results of parts of a study.

    Parameters
    ----------
    folder : Path
    minutes : float, optional
        No part is begun after this.
    """

    def __init__(self, folder: Path, minutes: float | None = None) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._results = folder / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        self._stop = None if minutes is None else time.monotonic() + 60 * minutes

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part: from its file, or by doing the work.

        Raises
        ------
        OutOfTimeError
            If there is work, and no time for it.
        """
        file = self._results / f"{name}.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
        if self._stop is not None and time.monotonic() > self._stop:
            raise OutOfTimeError(name)
        start = time.process_time()
        result = work()
        result["cpu_seconds"] = round(time.process_time() - start, 1)
        staged = file.with_suffix(".tmp")
        staged.write_text(json.dumps(result, indent=1) + "\n")
        staged.replace(file)
        print(f"{name}: {result['cpu_seconds']} s of one core", flush=True)
        return result

    def results(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Every result whose name starts so, without that start."""
        return {
            file.stem.removeprefix(prefix): json.loads(file.read_text())
            for file in sorted(self._results.glob(f"{prefix}*.json"))
        }
