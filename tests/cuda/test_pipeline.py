"""Launch after launch on a device that does its work late and in any order it may, against the reference."""

import logging
from pathlib import Path

import numpy as np
import pytest
from code_samples import assert_partials_equal
from host_gpu import HostGpu, Memory
from worker_checks import check, check_refine, sides, source

from ckptdiff.codes.fetch import AT
from ckptdiff.errors import ChangedFileError, DeviceError, PlanError
from ckptdiff.formats import FORMATS
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.batch import groups
from ckptdiff.measure.cuda.layout import ROWS, scan_settings
from ckptdiff.measure.cuda.slots import ALIGN, ENTRIES, MOST_ENTRIES, Room, fit_room
from ckptdiff.measure.partial import BINS, Partial, Rule, Scan
from ckptdiff.measure.records import empty_records
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory, SmallPairs, Window, in_memory
from ckptdiff.measure.thresholds import EPS as EPS_OF_RUNS

pytestmark = pytest.mark.slow

EPS = (0.0, 1e-8, 1e-5, 1e-4)
BF16, F32, F64 = (FORMATS[name] for name in ("bf16", "f32", "f64"))
SMALL = Room(8 << 15, 2)
"""A launch holds 2**17 coordinates of bfloat16, 2**15 of float64."""


class Same(InMemory):
    """A source whose sides are the same bytes."""

    def windows(self):
        for window in super().windows():
            yield Window(window.first, window.stop, window.base, window.base)


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule_gives_what_the_reference_gives(libraries, seed):
    worker = CudaBackend(HostGpu(libraries, seed, processors=1), SMALL)
    scan = Scan(BF16, BF16, BF16, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    for n in (1, (4 << 17) + 5, 7, 1 << 17):  # spans one after another use the same slots
        check(worker, scan, *sides(BF16, BF16, n, seed))


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_on_from_launch_to_launch(libraries, seed):
    worker = CudaBackend(HostGpu(libraries, seed, processors=1), SMALL)
    rng = np.random.default_rng(seed)
    n = (5 << 15) + 77
    tuned = rng.choice(np.array([0, 0, 1, 1, 2], np.float64), n).view(np.uint64)
    base = np.zeros(n, np.uint64)
    for first_tie, take in ((0, 12_345), (1000, 33_333)):
        scan = Scan(F64, F64, F64, EPS, 1e-3, Rule.TOP, 1.0, 70_000, take, want_mask=True)
        check(worker, scan, base, tuned, first_tie)


def test_a_scan_without_mask_brings_none_home(libraries):
    gpu = HostGpu(libraries)
    worker = CudaBackend(gpu, SMALL)
    check(worker, Scan(F32, BF16, BF16, EPS, 1e-3, Rule.ABOVE, 1e-5), *sides(F32, BF16, 200_000))
    assert gpu.launched == ["scan"] * 4 + ["harvest"]


def test_more_bins_than_come_home_at_once(libraries):
    gpu = HostGpu(libraries)
    scan = Scan(F32, F32, F32, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    base, tuned = sides(F32, F32, 200_003, kind="wild")
    seen = Partial()
    ReferenceBackend().scan(scan, source(base, tuned), seen)
    used = np.count_nonzero(seen.weights) + np.count_nonzero(seen.deltas)
    assert used > 2 * ENTRIES  # in three parts, the last of them short
    check(CudaBackend(gpu, SMALL), scan, base, tuned)


def test_settings_are_made_once_a_scan(libraries):
    worker = CudaBackend(HostGpu(libraries, processors=1), SMALL)
    scan = Scan(BF16, BF16, BF16, (0.0, 0.3), 1e-3, Rule.ABOVE, 0.125)  # of this test alone
    before = scan_settings.cache_info().misses
    for n in (70_000, 9, 300_000):
        check(worker, scan, *sides(BF16, BF16, n))
    assert scan_settings.cache_info().misses == before + 1


def test_an_empty_tensor_leaves_nothing(libraries):
    check(CudaBackend(HostGpu(libraries), SMALL), Scan(BF16, BF16, BF16, EPS, want_mask=True), *sides(BF16, BF16, 0))


def test_bytes_that_both_names_share_go_up_once(libraries):
    base, _ = sides(BF16, BF16, 150_000)
    got, expected = Partial(), Partial()
    scan = Scan(BF16, BF16, BF16, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    raw = base.view(np.uint8)
    mask = CudaBackend(HostGpu(libraries), SMALL).scan(scan, Same(raw, raw, base.size), got)
    right = ReferenceBackend().scan(scan, source(base, base), expected)
    assert_partials_equal(got, expected)
    np.testing.assert_array_equal(mask, right)


def small_rows(worker, scan, pairs):
    numel = pairs.numel
    records = empty_records(len(numel))
    done, bits, starts = worker.scan_small(scan, pairs, records)
    assert (starts % 8 == 0).all()
    rows = zip(starts.tolist(), numel.tolist(), strict=True) if scan.want_mask else ()
    return done, [bits[start : start + -(-n // 8)].copy() for start, n in rows], records


@pytest.fixture
def small_tensors(tmp_path):
    """Files of both sides, and where each tensor lies in them."""
    sizes = [3, 70_000, 1, 4096, 64, 300_000, 9, 9, 9, 9, 9, 9, 9, 9, 60_000, 33_000]
    pairs = [sides(BF16, BF16, n, i) for i, n in enumerate(sizes)]
    for base, _ in pairs:
        base[0] = 0  # the first bin of all
    stops = np.cumsum([2 * n for n in sizes])
    paths = []
    for side in (0, 1):
        paths.append(tmp_path / f"side{side}")
        paths[-1].write_bytes(b"".join(pair[side].tobytes() for pair in pairs))
    with paths[0].open("rb") as base, paths[1].open("rb") as tuned:
        runs = [
            np.array([(0, side.fileno(), stop - 2 * n) for stop, n in zip(stops, sizes, strict=True)])
            for side in (base, tuned)
        ]
        yield SmallPairs(*runs, np.array(sizes)), paths


@pytest.mark.parametrize("want_mask", [True, False])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_small_tensors_share_launches(libraries, small_tensors, seed, want_mask):
    gpu = HostGpu(libraries, seed, processors=1)
    worker = CudaBackend(gpu, Room(8 << 15, 8))
    scan = Scan(BF16, BF16, BF16, EPS_OF_RUNS, 1e-3, Rule.ABOVE, 1e-5, want_mask=want_mask)
    pairs, _ = small_tensors
    done, masks, records = small_rows(worker, scan, pairs)
    # Five, then one in three launches, then eight, then two.
    assert gpu.launched.count("scan") == 1 + 3 + 1 + 1
    assert gpu.launched.count("harvest") == 4
    right_done, right_masks, right = small_rows(CpuBackend(), scan, pairs)
    assert done == right_done == len(pairs.numel)
    assert len(masks) == len(right_masks) == (done if want_mask else 0)
    for mask, other in zip(masks, right_masks, strict=True):
        np.testing.assert_array_equal(mask, other)
    for name, value in right._asdict().items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(getattr(records, name), value, rtol=1e-11, atol=1e-14, err_msg=name)
        else:
            np.testing.assert_array_equal(getattr(records, name), value, err_msg=name)


def test_a_small_tensor_that_cannot_be_read_is_named_by_its_row(libraries, small_tensors):
    pairs, paths = small_tensors
    with paths[1].open("r+b") as file:
        file.truncate(int(pairs.tuned[7, AT]))
    worker = CudaBackend(HostGpu(libraries), Room(8 << 15, 8))
    scan = Scan(BF16, BF16, BF16, EPS_OF_RUNS, want_mask=True)
    assert small_rows(worker, scan, pairs)[0] == 7
    assert small_rows(worker, scan, SmallPairs(pairs.base[:7], pairs.tuned[:7], pairs.numel[:7]))[0] == 7


@pytest.mark.parametrize("seed", range(4))
def test_refine_equals_reference(libraries, seed):
    check_refine(CudaBackend(HostGpu(libraries, seed), SMALL), F32, *sides(F32, F32, 300_000, seed))


def test_less_room_is_taken_where_memory_is_short(libraries, caplog):
    room = Room(32 << 15, 4)
    with caplog.at_level(logging.WARNING):
        worker = CudaBackend(HostGpu(libraries, memory=room.gpu_bytes - 1), room)
    assert "GPU memory are not free" in caplog.text
    scan = Scan(BF16, BF16, BF16, EPS, 1e-3, Rule.BITWISE, want_mask=True)
    check(worker, scan, *sides(BF16, BF16, 400_000))


def test_too_little_memory_for_anything_is_an_error(libraries):
    with pytest.raises(DeviceError, match="too little free GPU memory"):
        CudaBackend(HostGpu(libraries, memory=1 << 20), Room())


def test_less_room_is_taken_where_less_can_be_page_locked(libraries, caplog):
    room = Room(32 << 15, 4)
    gpu = HostGpu(libraries, lockable=room.host_bytes - 1)
    with caplog.at_level(logging.WARNING):
        worker = CudaBackend(gpu, room)
    assert f"{room.host_bytes >> 20} MiB of host memory cannot be page-locked" in caplog.text
    assert gpu.locked == [room.halved().host_bytes]
    check(worker, Scan(BF16, BF16, BF16, EPS, 1e-3, Rule.BITWISE, want_mask=True), *sides(BF16, BF16, 400_000))


def test_nothing_that_can_be_page_locked_is_an_error(libraries):
    with pytest.raises(DeviceError, match="page-locked") as caught:
        CudaBackend(HostGpu(libraries, lockable=1 << 10), Room())
    assert "not so much can be page-locked" in caught.value.found


@pytest.mark.parametrize("room", [Room(), SMALL, Room.smallest(), Room(1 << 20, 7)])
def test_a_worker_takes_as_much_as_its_room_says(libraries, room):
    class Counting(HostGpu):
        on_gpu = 0

        def pinned(self, size):
            self.block = super().pinned(size)
            return self.block

        def empty(self, size):
            self.on_gpu += size
            return Memory(np.zeros(size, np.uint8))

    gpu = Counting(libraries)
    worker = CudaBackend(gpu, room)
    assert gpu.locked == [room.host_bytes]
    assert gpu.on_gpu == room.gpu_bytes
    pipeline = worker._pipeline
    parts = [totals._host for totals in pipeline._totals]
    for slot in pipeline._slots:
        parts += [slot.host_up, slot.host_down]
    starts = [part.ctypes.data - gpu.block.ctypes.data for part in parts]
    assert all(start % ALIGN == 0 for start in starts)
    ends = [start + -(-part.size // ALIGN) * ALIGN for start, part in zip(starts, parts, strict=True)]
    assert sorted(starts) == [0, *sorted(ends)[:-1]]  # one behind the other, and none within another
    assert max(ends) == room.host_bytes


def test_room_is_fitted_to_memory_and_threads():
    plenty = 1 << 40
    assert fit_room(plenty, plenty, 16) == (Room(), 16)
    room, threads = fit_room(400 << 20, plenty, 8)
    assert threads == 8 and room.side < Room().side and 8 * room.gpu_bytes <= 400 << 20
    room, threads = fit_room(2 * Room.smallest().gpu_bytes, plenty, 8)
    assert (room, threads) == (Room.smallest(), 2)
    with pytest.raises(PlanError, match="GPU memory"):
        fit_room(Room.smallest().gpu_bytes - 1, plenty, 1)


def test_room_is_fitted_to_host_memory_while_launches_are_worth_it():
    plenty = 1 << 40
    room, threads = fit_room(plenty, 8 * 40 << 20, 8)
    assert threads == 8 and room == Room(8 << 20) and 8 * room.host_bytes <= 8 * 40 << 20
    assert fit_room(plenty, -1, 8) == (Room(4 << 20), 8)


def test_a_task_is_four_launches():
    assert (Room().task_blocks, Room().coordinates(16)) == (32, 8 << 20)
    assert (Room(4 << 20).task_blocks, Room.smallest().task_blocks) == (8, 8)


def test_a_read_that_fails_is_reported_and_leaves_nothing_under_way(libraries, tmp_path):
    base, tuned = sides(BF16, BF16, 500_000)
    path = tmp_path / "short"
    path.write_bytes(base.tobytes()[:700_000])
    gpu = HostGpu(libraries)
    worker = CudaBackend(gpu, SMALL)
    scan = Scan(BF16, BF16, BF16, EPS)

    class Short(InMemory):
        def windows(self):
            with path.open("rb") as file:
                yield Window(0, 500_000, np.array([[0, file.fileno(), 0]]), in_memory(tuned.view(np.uint8)))

        def fail(self, first, stop):
            raise ChangedFileError("the shard shrank while it was read", found=(first, stop))

    with pytest.raises(ChangedFileError) as caught:
        worker.scan(scan, Short(base.view(np.uint8), tuned.view(np.uint8), 500_000), Partial())
    assert caught.value.found == (2 << 17, 3 << 17)
    assert gpu.queued == 0
    check(worker, scan, base, tuned)


@pytest.fixture
def failing(libraries, monkeypatch):
    """A worker on a device, of which one method raises an error when it is called for the nth time from now on."""

    def make(method, nth, error):
        gpu = HostGpu(libraries, nth, processors=1)
        worker, real, left = CudaBackend(gpu, SMALL), getattr(gpu, method), iter(range(nth))

        def call(*args):
            if next(left, None) is None:
                raise error
            return real(*args)

        monkeypatch.setattr(gpu, method, call)
        return gpu, worker, lambda: monkeypatch.setattr(gpu, method, real)

    return make


CALLS = {
    "upload": (0, 1, 2),
    "clear": (1,),
    "launch": (0, 2, 4),
    "record": (0, 5),
    "wait": (3,),
    "download": (1, 4),
    "synchronize": (0, 3),
}
"""Methods of a device, and which of their calls fail: in the first launch, with one under way, and with two."""


@pytest.mark.parametrize("error", [DeviceError("the GPU failed: CUDA_ERROR_LAUNCH_FAILED"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("method", "nth"),
    [(method, nth) for method, calls in CALLS.items() for nth in calls],
)
def test_whatever_fails_nothing_is_left_under_way(failing, method, nth, error):
    gpu, worker, mended = failing(method, nth, error)
    base, tuned = sides(BF16, BF16, (3 << 17) + 5)
    scan = Scan(BF16, BF16, BF16, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    with pytest.raises(type(error)) as caught:
        worker.scan(scan, source(base, tuned), Partial())
    assert caught.value is error
    assert gpu.queued == 0
    mended()
    check(worker, scan, base, tuned)


def test_the_first_error_is_reported(failing, monkeypatch):
    gpu, worker, _ = failing("launch", 2, DeviceError("the first"))
    finished = []

    def finish(stream):
        finished.append(stream)
        raise DeviceError("sticky")

    monkeypatch.setattr(gpu, "finish", finish)
    with pytest.raises(DeviceError, match="the first"):
        worker.scan(Scan(BF16, BF16, BF16, EPS), source(*sides(BF16, BF16, 4 << 17)), Partial())
    assert len(finished) == 3


def test_figures_that_cannot_be_taken_leave_nothing_under_way(libraries, small_tensors, monkeypatch):
    gpu = HostGpu(libraries, processors=1)
    worker, pairs = CudaBackend(gpu, Room(8 << 15, 8)), small_tensors[0]
    scan = Scan(BF16, BF16, BF16, EPS_OF_RUNS, want_mask=True)

    def fail(*args):
        gpu.record(worker._pipeline.up)  # so that something is queued, whatever this device has done already
        raise ZeroDivisionError

    monkeypatch.setattr("ckptdiff.measure.cuda.batch.fill_row", fail)
    with pytest.raises(ZeroDivisionError):
        small_rows(worker, scan, pairs)
    assert gpu.queued == 0


def test_a_pass_that_is_given_up_leaves_nothing_under_way(libraries):
    gpu = HostGpu(libraries, processors=1)
    worker = CudaBackend(gpu, SMALL)
    scan = Scan(BF16, BF16, BF16, EPS)
    jobs = worker._jobs(scan, source(*sides(BF16, BF16, 5 << 17)))
    landings = worker._pipeline.carry_out(worker._scan_work(scan), jobs)
    next(landings)
    gpu.record(worker._pipeline.up)
    landings.close()
    assert gpu.queued == 0


def test_the_benchmark_runs(libraries, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import gpu as bench

    base, tuned = bench.make_sides(1 << 19)
    device = HostGpu(libraries)
    rates = bench.gpu_rates(device, base, tuned, 1) | bench.read_rates(tmp_path, base, 1, piece=1 << 18)
    rates |= bench.pipeline_rates(device, tmp_path, base, tuned, 1)
    assert len(rates) == 10
    assert all(rate > 0 for rate in rates.values())


def test_bins_never_overflow_their_list(libraries):
    # Launches of tensors that use every bin: a list too short would be written beyond its end.
    room = Room(side=64 << 20, records=64)
    nowhere = np.zeros((40, 3), np.int64)
    cut = list(groups(Scan(BF16, BF16, BF16), SmallPairs(nowhere, nowhere, np.full(40, 1 << 20)), room))
    assert [index for group in cut for index in group.rows] == list(range(40))
    assert all(len(group.rows) * ROWS * BINS <= MOST_ENTRIES for group in cut)
