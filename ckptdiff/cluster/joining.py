"""Join a Ray cluster, or start one on this machine, and see that its nodes run what this process runs."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from ckptdiff.cluster.head import LOOK_UP, Head, require_head
from ckptdiff.cluster.on_ray import Cluster
from ckptdiff.cluster.ray_failures import RETRIES
from ckptdiff.errors import ClusterError, OptionError, first_few, required
from ckptdiff.events import Listener, Note
from ckptdiff.options import Options, RayOptions
from ckptdiff.remote.address import without_secrets

__all__ = ["joined_cluster"]

_LIBRARIES = "numpy", "numba", "scipy"
_SETTINGS = {
    "RAY_task_oom_retries": str(RETRIES),
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Read as Ray is imported. By itself it runs a task again for ever that the memory of a node does not hold, ends this
process, with a code of its own, a minute after the head of the cluster is gone, and prints errors of tasks that are
given up since another one failed."""


@contextmanager
def joined_cluster(asked: RayOptions, options: Options, tell: Listener) -> Iterator[Cluster]:
    """A cluster, as long as the ``with`` block lasts; a cluster that a program has joined already is taken as it is.

    Raises
    ------
    OptionError
        If Ray is not installed.
    ClusterError
        If nobody answers at the address, or a node has another ckptdiff, NumPy, Numba or SciPy, or none.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    ray = required("ray", "--engine ray", "ray")
    environment, heard = _variables(asked.environment), deque[str]()
    with _connection(ray, asked, heard) as head:
        nodes = head.nodes()
        if not nodes:
            raise ClusterError("the cluster has no node with a processor", hint="ray status shows its nodes")
        cluster = Cluster(ray, asked, options, head.nodes, tell)
        cluster.environment, cluster.heard, cluster.has_head = environment, heard, head.is_there
        processors = _compare(cluster)
        if len(processors) > 1:
            kinds = "; ".join(f"{first_few(names)}: {processor}" for processor, names in processors.items())
            text = "nodes differ in processors or kernels, so last digits of nulls and spectra depend on which did what"
            cluster.warnings = (f"{text} ({kinds})",)
        tell(Note(f"Ray {ray.__version__}, nodes {first_few(node.name for node in nodes)}"))
        yield cluster


@contextmanager
def _connection(ray: Any, asked: RayOptions, heard: deque[str]) -> Iterator[Head]:
    """Join a cluster, unless the program has; what Ray says of it meanwhile is `heard`."""
    if ray.is_initialized():
        yield Head(ray, asked.seconds)
        return
    _join(ray, asked.address)
    place = ray._private.worker
    printed = place.print_to_stdstream
    # It would print on stdout, where the report goes.
    place.print_to_stdstream = lambda said, ignore_prefix: heard.extend(said["lines"])
    head = Head(ray, asked.seconds)
    try:
        yield head
    finally:
        if head.is_there():
            ray.shutdown()
        else:
            # To leave the cluster Ray would wait for its head.
            atexit.unregister(ray.shutdown)
        place.print_to_stdstream = printed


def _variables(globs: Sequence[str]) -> dict[str, str]:
    """Environment variables by globs on their names, each of which has to match one."""
    found: dict[str, str] = {}
    for glob in globs:
        named = {name: value for name, value in os.environ.items() if fnmatchcase(name, glob)}
        if not named:
            raise OptionError("no environment variable has a name that --ray-env matches", found=glob)
        found |= named
    return found


def _join(ray: Any, address: str) -> None:
    named = RayOptions(address or os.environ.get("RAY_ADDRESS", "")).address
    if ":" in named:
        require_head(named)
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        with _command_without_secrets(ray):
            ray.init(address=address or None, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        found = "; ".join(map(str.strip, str(error).strip().splitlines()))
        raise ClusterError("the cluster cannot be joined", file=named or None, found=found, hint=LOOK_UP) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own in its place


@contextmanager
def _command_without_secrets(ray: Any) -> Iterator[None]:
    """Have Ray show the command of this process, which its dashboard and logs do, without what URLs in it hold."""
    place = ray._private.utils
    spelled = place.get_entrypoint_name
    place.get_entrypoint_name = lambda: without_secrets(spelled())
    try:
        yield
    finally:
        place.get_entrypoint_name = spelled


def _compare(cluster: Cluster) -> dict[str, list[str]]:
    """See that versions are the same everywhere; names of nodes by the processor and the kernels that they have."""
    ask = _asking()
    here = ask(_LIBRARIES)
    processors = defaultdict(list, {here.pop("processor"): ["here"]})
    for node, there in cluster.of_each_node(ask, _LIBRARIES):
        processors[there.pop("processor", "")].append(node.name)
        differ = [name for name in here if here[name] != there.get(name, "")]
        if differ:
            raise ClusterError(
                f"node {node.name} does not run what this process runs",
                expected=", ".join(f"{name} {here[name] or 'none'}" for name in differ),
                found=", ".join(f"{name} {there.get(name) or 'none'}" for name in differ),
                hint="install the same versions on every node",
            )
    return dict(processors)


def _asking() -> Callable[[Sequence[str]], dict[str, str]]:
    """A function that is sent as it is, since a node may have no ckptdiff."""

    def ask(libraries: Sequence[str]) -> dict[str, str]:
        from contextlib import suppress
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in libraries:
            with suppress(PackageNotFoundError):
                found[name] = version(name)
        with suppress(ImportError):
            import ckptdiff

            found["ckptdiff"] = ckptdiff.__version__
            from ckptdiff.kernel_cache import processor_name
            from ckptdiff.kernel_library import kernels_in_use
            from ckptdiff.runfile.belonging import hash_of_code

            found |= {"code": hash_of_code(), "processor": f"{processor_name()}, kernels {kernels_in_use()}"}
        return found

    return ask
