"""Ask the head of a Ray cluster: whether it is there, and for the nodes of the cluster."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import closing
from typing import Any

from ckptdiff.cluster.on_ray import Node
from ckptdiff.errors import ClusterError

__all__ = ["LOOK_UP", "Head", "require_head"]

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The preface of HTTP/2 and empty settings, which any gRPC server answers with settings of its own."""
_SETTINGS = 4
_TIMEOUT = 10.0
_SOON = 2.0
LOOK_UP = (
    "ray status on a machine of the cluster tells its address, and RAY_AUTH_TOKEN or ~/.ray/auth_token holds its token"
    " if it takes one; without --ray-address a cluster is started here"
)


class Head:
    """The head of the cluster that this process has joined.

    Parameters
    ----------
    ray : module
    seconds : float
        For which it may be away. Ray itself waits for it, whatever is asked.
    """

    def __init__(self, ray: Any, seconds: float) -> None:
        self._ray, self._seconds = ray, seconds
        self._address = ray.get_runtime_context().gcs_address
        self._away: float | None = None
        self._known: list[Node] = []
        self._asking: threading.Thread | None = None

    def is_there(self) -> bool:
        """Whether it takes connections."""
        try:
            _connected(self._address, _SOON).close()
        except OSError:
            return False
        return True

    def nodes(self) -> list[Node]:
        """Nodes with processors that are there now, or were when the head was last there.

        Raises
        ------
        ClusterError
            If it has been away for too long.
        """
        if self._asking is None and self.is_there():
            # In a thread that nobody waits for at the end: it may go right now, and Ray wait for it.
            self._asking = threading.Thread(target=self._list, name="ckptdiff-nodes", daemon=True)
            self._asking.start()
        if self._asking is not None:
            self._asking.join(_SOON)
            if not self._asking.is_alive():
                self._asking = self._away = None
                return self._known
        now = time.monotonic()
        self._away = self._away or now
        if now - self._away >= self._seconds:
            raise ClusterError(
                "the head of the cluster is gone",
                file=self._address,
                expected=f"an answer within {self._seconds:g} seconds",
                hint="look why it ended, and start the cluster again; with --resume what is done is not done again",
            )
        return self._known

    def _list(self) -> None:
        found = []
        for node in self._ray.nodes():
            cpus, memory = (int(node["Resources"].get(what, 0)) for what in ("CPU", "memory"))
            if node["Alive"] and cpus:
                name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"
                found.append(Node(node["NodeID"], name, cpus, memory, int(node["Resources"].get("GPU", 0))))
        self._known = found


def require_head(address: str) -> None:
    """Raise ClusterError if nobody answers at an address, or not as Ray does, which would wait for minutes."""
    try:
        with closing(_connected(address, _TIMEOUT)) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_GREETING)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except (OSError, OverflowError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        problem = "nobody answers at the address of the cluster"
        raise ClusterError(f"{problem}: {found}", file=address, hint=LOOK_UP) from error
    if len(answer) < 9 or answer[3] != _SETTINGS:
        raise ClusterError("what answers at the address is no Ray cluster", file=address, hint=LOOK_UP)


def _connected(address: str, seconds: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), seconds)
