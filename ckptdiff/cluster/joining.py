"""Join a Ray cluster, or start one on this machine, and see that its nodes run what this process runs."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ckptdiff.cluster.on_ray import Cluster, Node
from ckptdiff.errors import ClusterError, first_few, required
from ckptdiff.events import Listener, Note
from ckptdiff.options import Options, RayOptions

__all__ = ["joined_cluster"]

_LIBRARIES = "numpy", "numba", "scipy"
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The preface of HTTP/2 and empty settings, which any gRPC server answers with settings of its own."""
_SETTINGS = 4
_TIMEOUT = 10.0


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
    ray = required("ray", "--engine ray", "ray")
    joins = not ray.is_initialized()
    if joins:
        _join(ray, asked.address)
    try:
        nodes = _nodes(ray)
        if not nodes:
            raise ClusterError("the cluster has no node with a processor", hint="ray status shows its nodes")
        cluster = Cluster(ray, asked, options, lambda: _nodes(ray))
        processors = _compare(cluster)
        if len(processors) > 1:
            kinds = "; ".join(f"{first_few(names)}: {processor}" for processor, names in processors.items())
            text = "nodes differ in processors or kernels, so last digits of nulls and spectra depend on which did what"
            cluster.warnings = (f"{text} ({kinds})",)
        tell(Note(f"Ray {ray.__version__}, nodes {first_few(node.name for node in nodes)}"))
        yield cluster
    finally:
        if joins:
            ray.shutdown()


def _join(ray: Any, address: str) -> None:
    named = RayOptions(address or os.environ.get("RAY_ADDRESS", "")).address
    if ":" in named:
        _require_answer(named)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        ray.init(address=address or None, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        found = str(error).partition("\n")[0]
        raise ClusterError("the cluster cannot be joined", file=named or None, found=found, hint=_LOOK_UP) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own in its place


_LOOK_UP = (
    "ray status on a machine of the cluster tells its address, and RAY_AUTH_TOKEN or ~/.ray/auth_token holds its token"
    " if it takes one; without --ray-address a cluster is started here"
)


def _require_answer(address: str) -> None:
    """Raise ClusterError if nobody answers at an address, or not as Ray does, which would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_GREETING)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except (OSError, OverflowError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        problem = "nobody answers at the address of the cluster"
        raise ClusterError(f"{problem}: {found}", file=address, hint=_LOOK_UP) from error
    if len(answer) < 9 or answer[3] != _SETTINGS:
        raise ClusterError("what answers at the address is no Ray cluster", file=address, hint=_LOOK_UP)


def _nodes(ray: Any) -> list[Node]:
    """Nodes with processors that are there now."""
    found = []
    for node in ray.nodes():
        cpus, memory = (int(node["Resources"].get(what, 0)) for what in ("CPU", "memory"))
        if node["Alive"] and cpus:
            name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"
            found.append(Node(node["NodeID"], name, cpus, memory, int(node["Resources"].get("GPU", 0))))
    return found


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
