"""Whole runs with the CUDA backend on a host device: the run file of the CPU backend, byte for byte but for sums."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from host_gpu import HostGpu
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff import planning
from ckptdiff.backends.cuda.slots import Room
from ckptdiff.backends.cuda.worker import CudaWorker
from ckptdiff.devices import Device

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def on_host_gpu(libraries, monkeypatch):
    """Let `--device cuda` mean a host device of some seed."""

    def use(seed, room):
        def open_device(options):
            if options.device == "cpu":
                return real(options)
            return Device("cuda:0", lambda: CudaWorker(HostGpu(libraries, seed, processors=1), room))

        real = planning.open_device
        monkeypatch.setattr(planning, "open_device", open_device)

    return use


def datasets(path):
    """Every dataset with its attributes; mask chunks as they are stored."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            chunks = []
            if item.chunks and name.startswith("masks/"):
                count = item.id.get_num_chunks()
                chunks = [item.id.read_direct_chunk(item.id.get_chunk_info(i).chunk_offset) for i in range(count)]
            attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items() if "LIST" not in key}
            found[name] = (np.asarray(item[()]), chunks, attributes)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def assert_same_run(got, expected):
    assert got.keys() == expected.keys()
    for name, (value, chunks, attributes) in expected.items():
        if name == "provenance":
            continue
        assert got[name][1:] == (chunks, attributes), name
        if value.dtype.kind == "f":
            np.testing.assert_allclose(got[name][0], value, rtol=1e-11, atol=1e-14, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name][0], value, err_msg=name)


def run_both(base, tuned, tmp_path, **options):
    for device in ("cpu", "cuda"):
        ckptdiff.diff(base, tuned, out=tmp_path / f"{device}.h5", device=device, **options)
    assert_same_run(datasets(tmp_path / "cuda.h5"), datasets(tmp_path / "cpu.h5"))


@pytest.mark.parametrize(
    ("fixture", "mask", "options"),
    [
        ("llama", "abs:1e-05", {}),
        ("llama", "top:5", {"io": "mmap"}),
        ("moe", "bitwise", {"threads": 3}),
        ("fp8", "eta:0.01", {}),
        ("wide", "rel:0.001", {"compare": "stored"}),
        ("odd", "top:20", {}),
        ("tied", "abs:1e-05", {"io": "mmap"}),
    ],
)
def test_fixtures(on_host_gpu, tmp_path, fixture, mask, options):
    on_host_gpu(len(fixture + mask), Room.smallest())
    run_both(FIXTURES / fixture / "base", FIXTURES / fixture / "tuned", tmp_path, mask=mask, **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_tensor_of_several_spans_and_ties_at_the_cut(on_host_gpu, tmp_path, seed):
    on_host_gpu(seed, Room(1 << 20, 4))
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal((1024, 1100)) * 0.02).astype(np.float16)
    steps = rng.choice(np.array([0, 0, 0, 1e-3, 2e-3], np.float16), base.shape)
    tensors = {"big.weight": base, "bias": base[0].copy(), "step": np.arange(1000)}
    tuned = {"big.weight": base + steps, "bias": base[1].copy(), "step": np.arange(1000) // 2}
    for name, side in (("base", tensors), ("tuned", tuned)):
        save_file(side, tmp_path / f"{name}.safetensors")
    run_both(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path, mask="top:7", threads=2)
