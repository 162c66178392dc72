"""Hold ranges of remote files in memory: those that are asked for, and those that the next tasks will ask for.

A *lease* names all that a task will read. Its ranges are fetched while tasks before it are worked on, in that order, as
far as there is room ahead, and together with those of the next leases, so that requests are long where tasks are small;
a task that begins before its turn has them fetched at once. What nobody leased is fetched when it is asked for, with
what follows it if a file is read in order.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.interrupts import raise_pending
from ckptdiff.remote.remote_file import RemoteFile
from ckptdiff.remote.transport import fetch

__all__ = ["GAP", "ByteRange", "Fetching", "Lease", "coalesced", "fetch_ranges"]

GAP = 256 << 10
"""Bytes between two ranges that are fetched with them, rather than by a request of their own."""
PIECE = 16 << 20
"""Bytes of a request, at most; where there are several for one range, at least half of that."""
_LONGEST = PIECE
"""Bytes up to which ranges grow together: one request, in memory that the C library gives out again, as it does not of
what is longer than 32 MiB."""
_TOGETHER = 4 * _LONGEST
"""Bytes of leases that are fetched together, about: two such ranges of either side."""
_READ_ON = 8 << 20
"""Bytes fetched behind what is read in order."""
_ALIGNED = 64
_WAIT = 0.2


class ByteRange(NamedTuple):
    """Bytes ``start`` to ``stop`` - 1 of a remote file."""

    file: RemoteFile
    start: int
    stop: int


class _Extent:
    """A range that is being fetched, or is there."""

    def __init__(self, what: ByteRange, piece: int, room: NDArray[np.uint8]) -> None:
        self.what, self.room = what, room
        size = what.stop - what.start
        # Aligned, so that compiled code can read elements where they lie.
        self.data = room[-room.ctypes.data % _ALIGNED :][:size]
        self.leases = self.not_begun = self.not_over = 0
        count = max(-(-size // piece), 1)
        self.cuts = [size * part // count // _ALIGNED * _ALIGNED for part in range(count)] + [size]
        self.pieces: list[Future[None]] = []

    def holds(self, file: RemoteFile, start: int, stop: int) -> bool:
        """Whether it has, or will have, these bytes."""
        return self.what.file == file and self.what.start <= start and stop <= self.what.stop

    @property
    def ahead(self) -> bool:
        """Whether its bytes count as held ahead: not those of a task alone that has begun."""
        return self.not_begun > 0 or (self.leases > 1 and self.not_over > 0)


class _Rooms:
    """Memory of extents, used again: new pages take the system longer than what is written to them.

    What is kept is no more than what all extents took at once before.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._used = self._most = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """Room for so many bytes and their alignment, up to an eighth larger."""
        size += _ALIGNED
        fitting = [place for place, room in enumerate(self._free) if size <= room.size <= size * 9 // 8]
        if fitting:
            room = self._free.pop(min(fitting, key=lambda place: self._free[place].size))
        else:
            step = 1 << size.bit_length() - 6  # a little larger, since others of about that size will come
            room = np.empty(-(-size // step) * step, np.uint8)
        self._used += room.size
        self._most = max(self._most, self._used)
        self._drop()
        return room

    def give(self, room: NDArray[np.uint8], still: bool) -> None:
        """Take room back: for others, if it is `still`, and nobody writes to it."""
        self._used -= room.size
        if still:
            self._free.append(room)
            self._drop()

    def clear(self) -> None:
        """Keep nothing."""
        self._free.clear()
        self._most = self._used

    def _drop(self) -> None:
        while self._free and self._used + sum(room.size for room in self._free) > self._most:
            self._free.pop(0)


class Lease:
    """What a task will read; holds it between ``with`` and the end of that."""

    def __init__(self, fetching: Fetching, ranges: Sequence[ByteRange]) -> None:
        self._fetching, self.ranges = fetching, ranges
        self.nbytes = sum(each.stop - each.start for each in ranges)
        self.extents: list[_Extent] | None = None
        """None before it is fetched."""

    def __enter__(self) -> Lease:
        self._fetching.begin(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._fetching.end(self)


class Fetching:
    """Fetches ranges for all threads of a run.

    Parameters
    ----------
    room : int
        Bytes that may be held for tasks that have not begun, or for several together, and of what was read last.
    requests : int
        Under way at a time, at most.
    piece : int
        Bytes of a request, at most.
    """

    def __init__(self, room: int, requests: int = 16, piece: int = PIECE) -> None:
        self._room, self._piece = room, piece
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="ckptdiff-fetch")
        self._lock = threading.Lock()
        self._held: defaultdict[RemoteFile, list[_Extent]] = defaultdict(list)
        self._queue: deque[Lease] = deque()
        self._rooms = _Rooms()
        self._ahead = 0
        self._recent: deque[_Extent] = deque()
        self._ends: defaultdict[RemoteFile, deque[int]] = defaultdict(lambda: deque(maxlen=64))
        self._closed = False

    def close(self) -> None:
        """Give up what is under way."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def lease(self, ranges: Sequence[ByteRange]) -> Lease:
        """Ranges that a task will read; the order of calls is that in which they are fetched."""
        return self.leases([ranges])[0]

    def leases(self, wanted: Sequence[Sequence[ByteRange]], first: bool = False) -> list[Lease]:
        """The same for several tasks at once, in their order, or before all that wait: close ones go together."""
        leases = [Lease(self, coalesced(ranges)) for ranges in wanted]
        with self._lock:
            self._queue = deque([*leases, *self._queue] if first else [*self._queue, *leases])
            self._advance()
        return leases

    def begin(self, lease: Lease) -> None:
        """Have a lease fetched now, if it is not yet; its task has begun."""
        with self._lock:
            if lease.extents is None:
                self._queue.remove(lease)
                self._start([lease])
            for extent in lease.extents or ():
                with self._counted(extent):
                    extent.not_begun -= 1
            self._advance()

    def end(self, lease: Lease) -> None:
        """Forget what was fetched for a lease."""
        with self._lock:
            for extent in lease.extents or ():
                self._leave(extent)
            lease.extents = []
            self._advance()
            if not self._queue and not any(self._held.values()):
                self._rooms.clear()

    @contextmanager
    def view(self, file: RemoteFile, start: int, stop: int, end: int) -> Iterator[NDArray[np.uint8]]:
        """Bytes of a file, valid within the ``with``; those up to `end` may be read next.

        Raises
        ------
        CheckpointError
            As :func:`~ckptdiff.remote.transport.fetch` does.
        """
        with self._lock:
            # The newest is the one that goes last.
            found = next((extent for extent in reversed(self._held[file]) if extent.holds(file, start, stop)), None)
            if found is None:
                found = self._unleased(ByteRange(file, start, stop), end)
            # It may be that of another lease, which ends meanwhile.
            found.not_over += 1
        try:
            first, last = start - found.what.start, stop - found.what.start
            self._await(found, first, last)
            view = found.data[first:last]
            view.flags.writeable = False
            yield view
        finally:
            with self._lock:
                self._leave(found)

    def _unleased(self, what: ByteRange, end: int) -> _Extent:
        """What no lease holds; if that goes on where something ended, what follows is fetched too."""
        found = next((extent for extent in self._recent if extent.holds(*what)), None) or self._read(what)
        ends, behind = self._ends[what.file], min(found.what.stop + _READ_ON, end)
        if what.start in ends and found.what.stop < behind and not self._has(what.file, found.what.stop):
            self._keep(self._read(ByteRange(what.file, found.what.stop, behind)))
        ends.append(what.stop)
        return found

    def _has(self, file: RemoteFile, start: int) -> bool:
        return any(extent.holds(file, start, start + 1) for extent in (*self._held[file], *self._recent))

    def _keep(self, extent: _Extent) -> None:
        """Keep what was read ahead, as long as there is room."""
        self._recent.append(extent)
        while len(self._recent) > 1 and sum(each.data.size for each in self._recent) > self._room:
            self._recent.popleft()

    @contextmanager
    def _counted(self, extent: _Extent) -> Iterator[None]:
        """Keep the count of what is held ahead right where that may change."""
        before = extent.ahead
        yield
        self._ahead += (extent.ahead - before) * extent.room.size

    def _advance(self) -> None:
        while not self._closed and (group := self._next()):
            for lease in group:
                self._queue.remove(lease)
            self._start(group)

    def _next(self) -> list[Lease]:
        """Leases to fetch now, together; none if there is no room, or if there soon will be for more of them."""
        group: list[Lease] = []
        size = 0
        for lease in self._queue:
            size += lease.nbytes
            if group and size > min(_TOGETHER, self._room // 2):
                return group
            if self._ahead + size > self._room:
                break
            group.append(lease)
        return group if self._ahead <= self._room // 2 else []

    def _start(self, leases: Sequence[Lease]) -> None:
        ranges = coalesced([each for lease in leases for each in lease.ranges])
        found = [self._fetched(each, self._rooms.take(each.stop - each.start)) for each in ranges]
        for lease in leases:
            held = (next(one for one in found if one.holds(*each)) for each in lease.ranges)
            lease.extents = list({id(extent): extent for extent in held}.values())
            for extent in lease.extents:
                with self._counted(extent):
                    extent.leases += 1
                    extent.not_begun += 1
                    extent.not_over += 1
        for extent in found:
            self._held[extent.what.file].append(extent)

    def _leave(self, extent: _Extent) -> None:
        """One of those who hold an extent no longer does."""
        with self._counted(extent):
            extent.not_over -= 1
        if extent.leases and not extent.not_over:
            self._held[extent.what.file].remove(extent)
            self._rooms.give(extent.room, all(piece.done() for piece in extent.pieces))

    def _read(self, what: ByteRange) -> _Extent:
        return self._fetched(what, np.empty(what.stop - what.start + _ALIGNED, np.uint8))

    def _fetched(self, what: ByteRange, room: NDArray[np.uint8]) -> _Extent:
        extent = _Extent(what, self._piece, room)
        for first, last in zip(extent.cuts, extent.cuts[1:], strict=False):
            extent.pieces.append(self._pool.submit(self._fetch, what, extent.data[first:last], first))
        return extent

    def _fetch(self, what: ByteRange, out: NDArray[np.uint8], first: int) -> None:
        fetch(what.file.address, what.start + first, out.data, what.file.version, lambda: self._closed)

    def _await(self, extent: _Extent, first: int, last: int) -> None:
        parts = zip(extent.cuts, extent.cuts[1:], extent.pieces, strict=False)
        for begin, end, piece in parts:
            if begin < last and first < end:
                while not wait((piece,), _WAIT).done:
                    raise_pending()
                piece.result()


def fetch_ranges(ranges: Sequence[ByteRange]) -> Iterator[bytes]:
    """Short ranges, in order, several of them under way at a time; errors as :meth:`Fetching.view` has."""
    fetching = Fetching(0)
    try:
        with fetching.lease(ranges):
            for each in ranges:
                with fetching.view(*each, each.stop) as view:
                    yield view.tobytes()
    finally:
        fetching.close()


def coalesced(ranges: Sequence[ByteRange], gap: int = GAP, longest: int = _LONGEST) -> list[ByteRange]:
    """Ranges in their order, those of a file joined where little lies between them and they do not grow too long."""
    found: list[ByteRange] = []
    of_file: dict[RemoteFile, int] = {}
    for each in sorted(ranges, key=lambda each: each.start):
        at = of_file.get(each.file)
        if at is not None:
            last = found[at]
            if each.start - last.stop <= gap and each.stop - last.start <= longest:
                found[at] = last._replace(stop=max(last.stop, each.stop))
                continue
        of_file[each.file] = len(found)
        found.append(each)
    return found
