"""Hand tasks of a run to Ray, within what nodes have room for, and bring back what they gave."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

from ckptdiff.checkpoint import Shard
from ckptdiff.checkpoint.boxes import stored_parts
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.cluster.node_work import Failure, Sent, make_ready
from ckptdiff.cluster.ray_failures import RETRIES, failure_of
from ckptdiff.cluster.ray_tasks import RayHands, RayMatrices
from ckptdiff.cluster.tally import Tally
from ckptdiff.errors import CkptdiffError, ClusterError, plural
from ckptdiff.events import Listener, Note, ignore, stage
from ckptdiff.files.unfinished import Saving
from ckptdiff.interrupts import raise_pending
from ckptdiff.options import Options, RayOptions
from ckptdiff.remote.address import is_url
from ckptdiff.run.kept_results import KeptResults
from ckptdiff.run.planning import Plan, prepare
from ckptdiff.run.tasks import Grain, batched, plan_tasks
from ckptdiff.spectra.budget import Budget

__all__ = ["Cluster", "ClusterPlan", "Node"]

_GIB = 1 << 30
_THREADS = 4
"""Of a task, at most, unless the user names a number: a process for every few cores reads as fast as one for all."""
_LOOK = 2.0
"""Seconds between two looks at which nodes are there."""
_PATIENCE = 0.2
_NODE = re.compile(r"Node ID: ([0-9a-f]{56})")


@dataclass(frozen=True, slots=True)
class Node:
    """A node that tasks may run on."""

    id: str
    name: str
    cpus: int
    memory: int
    """Bytes that tasks may take, as Ray counts them."""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """How a run is spread over a cluster, as ``--dry-run`` prints it."""

    nodes: int
    tasks: int
    """Of the first pass over every tensor."""
    task_bytes: int
    """That a task reads, about."""
    task_threads: int
    task_memory: int
    """Bytes, as they are asked for from Ray."""
    at_once: int
    """Tasks that the nodes have room for at a time, or --parallel."""


class Cluster:
    """A cluster that this process has joined.

    Parameters
    ----------
    ray : module
    asked : RayOptions
    options : Options
        Of the run.
    nodes : callable
        Lists the nodes that are there now.

    Attributes
    ----------
    warnings : tuple of str
        What a run has to say of the nodes.
    has_head : callable
        Whether the head of the cluster is there.
    environment : dict of str to str
        Variables that tasks get from this process.
    heard : deque of str
        What Ray says in a thread of its own, which is told in that of the run.
    numbers : iterator of int
        For tasks; none comes twice, since what the tally was told of one may come late.
    """

    def __init__(
        self, ray: Any, asked: RayOptions, options: Options, nodes: Callable[[], list[Node]], tell: Listener = ignore
    ) -> None:
        self.ray, self._asked, self._options, self._list, self._tell = ray, asked, options, nodes, tell
        self.warnings: tuple[str, ...] = ()
        self.has_head: Callable[[], bool] = lambda: True
        self.environment: dict[str, str] = {}
        self.heard = deque[str]()
        self.numbers = itertools.count()
        self._sent: Any = None
        self._names: dict[str, str] = {}
        self._listed: tuple[float, list[Node]] = (-math.inf, [])
        self._seen = time.monotonic()

    @property
    def threads(self) -> int:
        """Threads of a task."""
        return self._options.threads or min(_THREADS, min(node.cpus for node in self._nodes()))

    def prepare(
        self,
        base: str,
        tuned: str,
        *,
        out: Path | None = None,
        tell: Listener,
        grain: Grain | None = None,
        saving: Saving | None = None,
        read_data: bool = True,
    ) -> Plan:
        """Make the plan of a run, with memory and threads of one task; arguments and errors are those of `prepare`."""
        options = self._options
        # GPUs are the nodes': this process opens none, and coordinates are compared by processors.
        device = options.device if options.device == "reference" else "cpu"
        here = replace(options, device=device, threads=self.threads)
        plan = prepare(base, tuned, out=out, options=here, tell=tell, read_data=read_data, grain=grain, saving=saving)
        diff = plan.diff
        said = replace(diff, options=options.as_json(), warnings=(*diff.warnings, *self.warnings))
        return replace(plan, facts=lambda: said)

    def spread(self, plan: Plan) -> ClusterPlan:
        """How a plan is spread over the nodes; ClusterError if none of them can hold a task."""
        threads, nodes, most = plan.threads, self._nodes(), self._most_bytes(plan)
        tasks, masks = 0, 0
        for batch in batched(plan_tasks(plan.loads, plan.grain), plan.loads, most):
            tasks += 1
            if plan.want_masks:
                masks = max(masks, sum(task.numel(plan.loads) for task in batch) // 8)
        # Masks are held as chunks, joined, and as Ray packs them.
        memory = plan.memory.projected + 3 * masks
        places = sum(_fits(node, threads, memory) for node in nodes)
        if not places:
            raise _no_node(threads, memory, nodes)
        return ClusterPlan(len(nodes), tasks, most, threads, memory, self._asked.parallel or places)

    def make_ready(self, plan: Plan, tell: Listener) -> None:
        """Send the plan, have each node look for its files, and compile kernels there; the first error is raised."""
        spread, spectra = self.spread(plan), self._options.spectra
        text = f"{plural(spread.nodes, 'node')} of Ray, {plural(spread.tasks, 'task')} of {spread.task_bytes >> 20} MiB"
        tell(Note(f"{text}, {spread.at_once} at once, each with {spread.task_memory >> 20} MiB"))
        facts = replace(plan.diff, tensors=(), base={}, tuned={}, only_in_base=(), only_in_tuned=(), aliased=())
        facts = replace(facts, mismatched=(), warnings=())
        bare: Any = replace(plan, facts=lambda: facts, device=None, saving=None)  # type: ignore[arg-type]
        on_gpu = None
        if spectra is not None and self.on_gpu:
            if not any(node.gpus for node in self._nodes()):
                raise _no_node(1, 0, self._nodes(), 1)
            on_gpu = replace(self._options, device="cuda")  # Ray shows a task no GPU but its own
        with self.told("sending the plan"):
            self._sent = self.ray.put(Sent(bare, str(Path.cwd()), on_gpu, self.environment))
        shards = _local_shards(plan)
        with stage(tell, "preparing nodes") as told:
            for done, (node, _) in enumerate(self.of_each_node(make_ready, [self._sent], shards, idle=told.again)):
                told.at((done + 1) / spread.nodes, node.name)

    def hands(self, plan: Plan, shards: OpenShards, kept: KeptResults | None) -> RayHands:
        """Whoever does the tasks of the coordinate pass."""
        for shard in _local_shards(plan):
            _ = shards[shard]  # held open, to be looked at after the last read like those that are read here
        return RayHands(self, plan, self._sent, kept)

    def matrices(self, plan: Plan) -> RayMatrices:
        """Whoever measures matrices."""
        return RayMatrices(self, plan, self._sent, self._options)

    @property
    def on_gpu(self) -> bool:
        """Whether spectra are measured on GPUs."""
        return self._options.device.startswith("cuda")

    @cached_property
    def tally(self) -> Any:
        """Where nodes tell how far they are; it lives on this node if it may."""
        here = self.ray.get_runtime_context().get_node_id()
        actor = self.ray.remote(num_cpus=0, max_restarts=-1)(Tally)
        return actor.options(scheduling_strategy=self._affinity(here, soft=True)).remote()

    def of_each_node(
        self, function: Callable[..., Any], *given: Any, idle: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Node, Any]]:
        """What a function gives on each node, which takes no processor there; nodes that are lost meanwhile give none.

        While they are waited for, `idle` is called again and again.
        """
        remote, begun = self.ray.remote(num_cpus=0, max_retries=RETRIES)(function), []
        for node in self._nodes():
            strategy = self._affinity(node.id, soft=False)
            begun.append((node, remote.options(scheduling_strategy=strategy).remote(*given)))
        for node, reference in begun:
            while not self.there([reference]):
                idle()
            try:
                found = self.get(reference, f"looking at node {node.name}")
            except ClusterError:
                self._listed = time.monotonic(), self._list()
                if any(one.id == node.id for one in self._listed[1]):
                    raise
                continue
            yield node, found

    def task(self, function: Callable[..., Any], threads: int, memory: int, gpus: int = 0) -> Any:
        """A function that runs wherever there is room for it, and again if its worker or node dies."""
        asked = {"num_cpus": threads, "memory": memory, "max_retries": RETRIES, "retry_exceptions": False}
        return self.ray.remote(**asked, num_gpus=gpus, scheduling_strategy="SPREAD")(function)

    def at_once(self, threads: int, memory: int, gpus: int = 0) -> int:
        """Tasks to hand out before the first of them is done; ClusterError as ``require_room`` raises it."""
        places = sum(_fits(node, threads, memory, gpus) for node in self._nodes())
        self.require_room(threads, memory, gpus)
        return self._asked.parallel or 2 * places + 2

    def budget(self, taken: int) -> Budget:
        """How matrices share memory and threads of a node."""
        options, nodes = self._options, self._nodes()
        assert options.spectra is not None
        if self.on_gpu:
            return Budget.on_gpu(options.spectra, options.gpu_memory or 1 << 62, 0)
        bound = options.max_memory or min(node.memory for node in nodes)
        return Budget(options.spectra, bound, taken, options.threads or min(node.cpus for node in nodes))

    def there(self, references: Iterable[Any], seconds: float = _PATIENCE) -> list[Any]:
        """Wait so long at most; those of what tasks give that are here."""
        raise_pending()
        self._nodes()  # whether the head of the cluster is gone
        self._tell_heard()
        with self.told("waiting for tasks"):
            return list(self.ray.wait(list(references), timeout=seconds)[0])

    def _tell_heard(self) -> None:
        while self.heard:
            text = self.heard.popleft()
            nodes = "".join(f" (node {self._name(node)})" for node in _NODE.findall(text)[:1])
            said = shorten(text.partition("\n")[0].removesuffix(" Error: "), 200, placeholder=" ...")
            self._tell(Note(f"Ray: {said}{nodes}", warning=True))

    def require_room(self, threads: int, memory: int, gpus: int = 0) -> None:
        """Raise ClusterError if no node that could hold a task has been there for too long."""
        now, nodes = time.monotonic(), self._nodes()
        if any(_fits(node, threads, memory, gpus) for node in nodes):
            self._seen = now
        elif now - self._seen > self._asked.seconds:
            raise _no_node(threads, memory, nodes, gpus)

    def get(self, reference: Any, what: str, number: int | None = None) -> Any:
        """What a task gave, which has a number if the tally knows it; raises what went wrong, as an error of ours."""
        with self.told(what, number):
            found = self.ray.get(reference)
        if isinstance(found, Failure):
            error = found.error
            error.problem = f"node {self._name(found.node)}: {error.problem}"
            if error.file is not None and is_url(error.file) and not self._asked.environment:
                error.hint = f"{error.hint}; nodes ask with what their own environment holds, or --ray-env gives them"
            raise error
        return found

    @contextmanager
    def told(self, what: str, number: int | None = None) -> Iterator[None]:
        """Turn errors of Ray into ours."""
        try:
            yield
        except (self.ray.exceptions.RayError, OSError) as error:
            self._tell_heard()
            nodes = [] if number is None else self._begun_on(number)
            raise failure_of(self.ray, error, what, list(map(self._name, nodes))) from error

    def _begun_on(self, number: int) -> list[str]:
        """IDs of nodes on which a task has begun; none if nobody has told the tally within seconds, or it is lost."""
        until = time.monotonic() + _LOOK
        with suppress(self.ray.exceptions.RayError, OSError):
            while (left := until - time.monotonic()) > 0:
                asked = self.tally.nodes.remote(number)
                if self.ray.wait([asked], timeout=left)[0] and (found := self.ray.get(asked)):
                    return list(found)
                time.sleep(_PATIENCE)
        return []

    def _nodes(self) -> list[Node]:
        """The nodes, as they were a moment ago."""
        now = time.monotonic()
        if now - self._listed[0] > _LOOK:
            self._listed = now, self._list()
        return self._listed[1]

    def _name(self, node: str) -> str:
        self._names |= {one.id: one.name for one in self._nodes()}
        return self._names.get(node, node[:8])

    def _affinity(self, node: str, soft: bool) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=soft)

    def _most_bytes(self, plan: Plan) -> int:
        if self._asked.task_bytes:
            return self._asked.task_bytes
        places = sum(node.cpus // plan.threads for node in self._nodes())
        return min(max(plan.total_bytes // max(4 * places, 1), _GIB), 4 * _GIB)


def _fits(node: Node, threads: int, memory: int, gpus: int = 0) -> int:
    """How many tasks a node holds at a time."""
    return min(node.cpus // threads, node.memory // memory, node.gpus // gpus if gpus else node.cpus)


def _no_node(threads: int, memory: int, nodes: list[Node], gpus: int = 0) -> CkptdiffError:
    best = max(nodes, key=lambda node: (node.gpus >= gpus, min(node.cpus, threads), node.memory), default=None)
    found = (
        "no node" if best is None else f"at best {best.cpus} and {best.memory >> 20} MiB, {plural(best.gpus, 'GPU')}"
    )
    wanted = f"{plural(threads, 'CPU')} and {memory >> 20} MiB" + (f", {plural(gpus, 'GPU')}" if gpus else "")
    return ClusterError(
        "no node of the cluster can hold a task",
        expected=wanted,
        found=found,
        hint="fewer --threads, or nodes with more; ray status shows them",
    )


def _local_shards(plan: Plan) -> list[Shard]:
    found: dict[str, Shard] = {}
    for pair in plan.pairs:
        for side in (pair.base, pair.tuned):
            for tensor in stored_parts(side):
                for shard in [one.shard for one in tensor.slices] or [tensor.shard]:
                    if shard.remote is None:
                        found[shard.path] = shard
    return list(found.values())
