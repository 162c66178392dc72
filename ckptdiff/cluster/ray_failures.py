"""Tell errors of Ray as ours: on which nodes it was tried, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptdiff.errors import ClusterError
from ckptdiff.remote.address import without_secrets

__all__ = ["RETRIES", "failure_of"]

RETRIES = 3
"""How often a task is run again whose worker or node is lost."""
_GO_ON = "With --resume what is done is not done again"


def failure_of(ray: Any, error: Exception, what: str, nodes: Sequence[str] = ()) -> ClusterError:
    """An error of Ray as one of ours, that says on which nodes it was tried, and what to do."""
    known = ray.exceptions
    if not isinstance(error, known.RayError):
        problem, found = f"{what}: the node that this process belongs to is gone", str(error)
        return ClusterError(problem, found=found, hint=f"look why it was lost. {_GO_ON}")
    where = f" (on {', '.join(nodes)})" if nodes else ""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, known.ObjectStoreFullError | known.OutOfDiskError):
        return ClusterError(
            f"{what}{where}: the object store of the cluster is full, and so is the disk that it spills to",
            found=_first_line(cause),
            hint="make room in Ray's folder for temporary files on the nodes, or a smaller --parallel",
        )
    if isinstance(error, known.RayTaskError):
        found = without_secrets(f"{type(cause).__name__}: {cause}")
        return ClusterError(f"{what} failed{where}", found=found, hint="report it")
    problem, hint = f"{what} failed again and again{where}, with the worker or the node", "look at Ray's logs of it"
    if isinstance(error, known.OutOfMemoryError):
        problem = f"{what}: Ray has ended it for want of memory again and again{where}"
        hint = "a lower --max-memory, fewer --threads, or nodes with more memory"
    elif isinstance(error, known.WorkerCrashedError):
        hint = f"look at python-core-worker-*.log in Ray's logs of it, and for what ends processes there. {_GO_ON}"
    elif isinstance(error, known.NodeDiedError):
        hint = f"look why it was lost, or leave it out of the cluster. {_GO_ON}"
    return ClusterError(problem, expected=f"{RETRIES} further tries to suffice", found=_first_line(error), hint=hint)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
