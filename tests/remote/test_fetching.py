"""What is fetched when: ranges that lie close as one, and no more ahead than there is room for."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE
from ranged_server import Asked, Handler, Server

from ckptdiff.errors import CheckpointError
from ckptdiff.remote.address import Url
from ckptdiff.remote.fetching import GAP, ByteRange, Fetching, _Rooms, coalesced
from ckptdiff.remote.remote_file import RemoteFile, Version
from ckptdiff.remote.transport import fetch_start

WHOLE = np.random.default_rng(3).integers(0, 256, 1 << 20, np.uint8).tobytes()
FILES = [RemoteFile(Url(f"https://host/{name}"), Version(10**6, name, "")) for name in "ab"]

ranges = st.lists(
    st.builds(
        lambda file, start, size: ByteRange(file, start, start + size),
        st.sampled_from(FILES),
        st.integers(0, 5000),
        st.integers(1, 300),
    ),
    max_size=30,
)


@given(asked=ranges, gap=st.integers(0, 400), longest=st.integers(300, 2000))
def test_joined_ranges_hold_all_that_was_asked_for_and_little_else(
    asked: list[ByteRange], gap: int, longest: int
) -> None:
    found = coalesced(asked, gap, longest)
    for one in asked:
        assert any(held.file == one.file and held.start <= one.start and one.stop <= held.stop for held in found)
    for held in found:
        assert held.stop - held.start <= max(longest, *(one.stop - one.start for one in asked))
        inside = [one for one in asked if one.file == held.file and held.start <= one.start and one.stop <= held.stop]
        covered = np.zeros(held.stop - held.start, bool)
        for one in inside:
            covered[one.start - held.start : one.stop - held.start] = True
        assert covered[0] and covered[-1]
        assert "0" * (gap + 1) not in "".join("01"[bit] for bit in covered.tolist())


@pytest.fixture
def file(server: Server) -> RemoteFile:
    (server.root / "file").write_bytes(WHOLE)
    address = Url(f"{server.url}/file")
    found = RemoteFile(address, fetch_start(address, 8)[1])
    server.asked.clear()
    return found


@pytest.mark.slow
def test_leases_are_fetched_ahead_in_their_order_as_far_as_there_is_room(server: Server, file: RemoteFile) -> None:
    fetching = Fetching(room=150_000, requests=1, piece=32_000)
    leases = [fetching.lease([ByteRange(file, start, start + 64_000)]) for start in range(0, 640_000, 64_000)]

    def wanted(count: int) -> None:
        begun = [lease for lease in leases if lease.extents is not None]
        assert begun == leases[:count], "two at a time fit"

    wanted(2)
    for number, lease in enumerate(leases):
        with lease:
            wanted(min(number + 3, 10))
            start = lease.ranges[0].start
            with fetching.view(file, start + 5, start + 63_999, len(WHOLE)) as view:
                assert view.tobytes() == WHOLE[start + 5 : start + 63_999]
                assert not view.flags.writeable
    fetching.close()
    spans = server.ranges_of("file")
    assert [start for start, _ in spans] == list(range(0, 640_000, 32_000)), "each once, in order"
    assert all(stop - start == 32_000 for start, stop in spans)


@pytest.mark.slow
def test_a_task_that_begins_before_its_turn_waits_for_no_other(server: Server, file: RemoteFile) -> None:
    fetching = Fetching(room=10, requests=2)
    first, second = (fetching.lease([ByteRange(file, start, start + 1000)]) for start in (0, 5000))
    with second, fetching.view(file, 5000, 6000, len(WHOLE)) as view:
        assert view.tobytes() == WHOLE[5000:6000] and first.extents is None
    with first, fetching.view(file, 0, 1000, len(WHOLE)) as view:
        assert view.tobytes() == WHOLE[:1000]
    fetching.close()


@pytest.mark.slow
def test_what_fails_ahead_fails_the_task_that_reads_it(server: Server, file: RemoteFile) -> None:
    server.answer = lambda handler, asked: handler.reply(403) is None
    fetching = Fetching(room=10_000)
    lease, refused = fetching.lease([ByteRange(file, 0, 1000)]), pytest.raises(CheckpointError, match="refuses")
    with lease, refused, fetching.view(file, 0, 1000, len(WHOLE)):
        pass
    fetching.close()


@pytest.mark.slow
def test_closing_gives_up_what_is_under_way(server: Server, file: RemoteFile) -> None:
    begun, on = threading.Event(), threading.Event()

    def slow(handler: Handler, asked: Asked) -> bool:
        begun.set()
        handler.send_response(206)
        for name, value in (("Content-Range", f"bytes 0-{len(WHOLE) - 1}/{len(WHOLE)}"), ("ETag", file.version.etag)):
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(WHOLE)))
        handler.end_headers()
        for start in range(0, len(WHOLE), 1 << 16):
            if on.wait(0.02):
                break
            handler.wfile.write(WHOLE[start : start + (1 << 16)])
        return True

    server.answer = slow
    fetching = Fetching(room=len(WHOLE))
    lease = fetching.lease([ByteRange(file, 0, len(WHOLE))])
    assert begun.wait(PATIENCE)
    fetching.close()
    assert lease.extents is not None and all(piece.done() for piece in lease.extents[0].pieces)
    on.set()


@pytest.mark.slow
def test_small_tasks_are_fetched_together(server: Server, file: RemoteFile) -> None:
    """So that requests are long, whatever tasks are; each task still has all it asked for, and no byte comes twice."""
    fetching = Fetching(room=len(WHOLE), requests=4, piece=64_000)
    wanted = [[ByteRange(file, start, start + 2_000)] for start in range(0, 1_000_000, 2_000)]
    leases = fetching.leases(wanted)
    for lease, (part,) in zip(leases, wanted, strict=True):
        with lease, fetching.view(*part, part.stop) as view:
            assert view.tobytes() == WHOLE[part.start : part.stop]
    fetching.close()
    spans = sorted(server.ranges_of("file"))
    assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]], "each byte once"
    assert spans[0][0] == 0 and spans[-1][1] == 1_000_000 and len(spans) < 30


def held_bytes(fetching: Fetching) -> int:
    return sum(len(extent.room) for extents in fetching._held.values() for extent in extents)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 40_000, 1 << 20])
def test_memory_is_used_again_by_nobody_who_would_disturb(server: Server, file: RemoteFile, room: int) -> None:
    """Threads read at random, hold what they read past the end of other tasks, and see their own bytes throughout."""
    rng = np.random.default_rng(4)
    starts = np.sort(rng.integers(0, len(WHOLE) - 9_000, 60))
    wanted = [
        [ByteRange(file, start, start + size), ByteRange(file, start // 2, start // 2 + 300)]
        for start, size in zip(starts.tolist(), rng.integers(1, 9_000, 60).tolist(), strict=True)
    ]
    fetching = Fetching(room=room, requests=4, piece=64_000)
    leases, failed, most = fetching.leases(wanted), [], 0
    following = iter(list(zip(leases, wanted, strict=True)))
    lock = threading.Lock()

    def work(seed: int) -> None:
        nonlocal most
        own = np.random.default_rng(seed)
        try:
            while True:
                with lock:
                    lease, parts = next(following, (None, []))
                if lease is None:
                    return
                with lease, ExitStack() as stack:
                    views = [stack.enter_context(fetching.view(*part, part.stop)) for part in parts]
                    with lock:
                        most = max(most, held_bytes(fetching))
                    time.sleep(own.uniform(0, 0.002))
                    for part, view in zip(parts, views, strict=True):
                        if view.tobytes() != WHOLE[part.start : part.stop]:
                            failed.append(part)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetching.close()
    assert not failed
    # Three tasks at work, each of which may hold back one that it overlaps, and what is ahead; room comes in steps.
    assert most <= (room + 6 * (9_300 + GAP)) * 9 / 8
    assert not any(fetching._held.values()) and not fetching._rooms._free


def test_room_is_taken_again_and_never_more_is_kept_than_was_in_use() -> None:
    rooms, rng = _Rooms(), np.random.default_rng(0)
    used: list[np.ndarray] = []
    most = again = 0
    given = set()
    for _ in range(2000):
        if used and rng.random() < 0.5:
            room = used.pop(int(rng.integers(len(used))))
            still = rng.random() < 0.9
            rooms.give(room, still)
            given |= {room.ctypes.data} if still else set()
        elif sum(map(len, used)) < 1 << 20:
            size = int(rng.integers(1, 1 << 17))
            room = rooms.take(size)
            assert size + 64 <= len(room) <= (size + 64) * 9 / 8
            assert all(room.ctypes.data != other.ctypes.data for other in used)
            again += room.ctypes.data in given
            used.append(room)
        most = max(most, sum(map(len, used)))
        assert sum(map(len, used)) + sum(map(len, rooms._free)) <= most
    assert again > 100
