"""Whole runs with the CUDA backend on a host device: the run file of the CPU backend, byte for byte but for sums."""

from pathlib import Path

import numpy as np
import pytest
import torch
from host_gpu import HostGpu
from quantised import LAYOUTS, Sample, save
from run_files import assert_same_run, datasets
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import ckptdiff
from ckptdiff.errors import DeviceError
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.options import Options
from ckptdiff.report.as_json import document
from ckptdiff.run import planning
from ckptdiff.run.devices import Device

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def on_host_gpu(libraries, monkeypatch):
    """Let `--device cuda` mean a host device of some seed."""

    def use(seed, room):
        def open_device(options):
            if options.device == "cpu":
                return real(options)
            return Device("cuda:0", worker, batches=True, decodes=True)

        def worker():
            devices.append(HostGpu(libraries, seed, processors=1))
            return CudaBackend(devices[-1], room)

        real, devices = planning.open_device, list[HostGpu]()
        monkeypatch.setattr(planning, "open_device", open_device)
        return devices

    return use


def run_both(base, tuned, tmp_path, **options):
    found = {}
    for device in ("cpu", "cuda"):
        found[device] = document(ckptdiff.diff(base, tuned, out=tmp_path / f"{device}.h5", device=device, **options))
    assert_same_run(datasets(tmp_path / "cuda.h5"), datasets(tmp_path / "cpu.h5"))
    assert_same_document(found["cuda"], found["cpu"])


def assert_same_document(got, expected):
    """Floats are sums, or made of them."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
    if isinstance(expected, dict | list):
        assert len(got) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same_document(got[key], expected[key])
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-11, abs=1e-14)
    else:
        assert got == expected


@pytest.mark.parametrize(
    ("fixture", "mask", "options"),
    [
        ("llama", "abs:1e-05", {}),
        ("llama", "top:5", {"io": "mmap"}),
        ("moe", "bitwise", {"threads": 3}),
        pytest.param("fp8", "eta:0.01", {}, marks=pytest.mark.slow),
        pytest.param("wide", "rel:0.001", {"compare": "stored"}, marks=pytest.mark.slow),
        ("odd", "top:20", {}),
        ("tied", "abs:1e-05", {"io": "mmap"}),
    ],
)
def test_fixtures(on_host_gpu, tmp_path, fixture, mask, options):
    on_host_gpu(len(fixture + mask), Room.smallest())
    run_both(FIXTURES / fixture / "base", FIXTURES / fixture / "tuned", tmp_path, mask=mask, **options)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
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


def test_sides_that_are_not_stored_alike(on_host_gpu, tmp_path):
    """Pieces in runs, swapped axes, fp8 with scales, and more rows on one side."""
    on_host_gpu(3, Room(1 << 20, 4))
    rng = np.random.default_rng(3)
    experts = (rng.standard_normal((3, 256, 96)) * 0.02).astype(np.float16)
    down = (rng.standard_normal((3, 96, 128)) * 0.02).astype(np.float16)
    moved, moved_down = experts + rng.choice(np.array([0, 0, 1e-3], np.float16), experts.shape), down[::-1].copy()
    prefix = "model.layers.0.mlp"
    base = {f"{prefix}.experts.{e}.gate_proj.weight": experts[e, :128] for e in range(3)}
    base |= {f"{prefix}.experts.{e}.up_proj.weight": experts[e, 128:] for e in range(3)}
    base |= {f"{prefix}.experts.{e}.down_proj.weight": down[e] for e in range(3)}
    swapped = {"gate_up_proj": moved.transpose(0, 2, 1), "down_proj": moved_down.transpose(0, 2, 1)}
    tuned = {f"{prefix}.experts.{name}": np.ascontiguousarray(side) for name, side in swapped.items()}
    base["model.embed_tokens.weight"] = experts[0, :20].copy()
    tuned["model.embed_tokens.weight"] = experts[1, :30].copy()
    codes = rng.integers(0, 0x70, (256, 300), np.uint8)
    for number, side in enumerate((base, tuned)):
        side = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in side.items()}
        side[f"{prefix}.x_proj.weight"] = torch.from_numpy(codes ^ np.uint8(number)).view(torch.float8_e4m3fn)
        side[f"{prefix}.x_proj.weight_scale_inv"] = torch.full((2, 3), 0.5 + number)
        save_torch(side, tmp_path / f"{number}.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    run_both(tmp_path / "0.safetensors", tmp_path / "1.safetensors", tmp_path, mask="bitwise", threads=2)
    with ckptdiff.RunFile(tmp_path / "cuda.h5") as run:
        facts = {facts.name: facts for facts in run.load().tensors}
    assert facts[f"{prefix}.experts.2.down_proj.weight"].pieces[0].transposed
    assert facts[f"{prefix}.x_proj.weight"].dtype_base == "FP8" and facts["model.embed_tokens.weight"].rows


MET = {
    "DeepSeek fp8": "DeepSeek fp8",
    "NVFP4 of compressed-tensors": "NVFP4 of ModelOpt",
    "MXFP4 of GPT-OSS": "MXFP4 of GPT-OSS",
    "MXFP8": "DeepSeek fp8",
    "4 bits in words, zero points": "4 bits in words, zero points",
}
"""What is stored on one side, and on the other."""


@pytest.mark.parametrize(("base", "tuned"), MET.items())
def test_codes_are_decoded_on_the_device(on_host_gpu, tmp_path, base, tuned):
    """Of both sides, over several launches, of fp8 several spans: a run file and a report as of the processor."""
    devices = on_host_gpu(len(base), Room.smallest())
    rng, spans = np.random.default_rng(len(base)), base == tuned == "DeepSeek fp8"
    sides = [LAYOUTS[layout](rng, 1300 if spans else 130, 896) for layout in (base, tuned)]
    if base == tuned:
        moved(sides, rng)
    paths = [save(tmp_path / str(number), side.tensors, side.config) for number, side in enumerate(sides)]
    run_both(*paths, tmp_path, mask="top:5", threads=2, compare="stored" if base.startswith("4 bits") else "bf16")
    assert sum(device.launched.count("decode") for device in devices) > 2
    with ckptdiff.RunFile(tmp_path / "cuda.h5") as run:
        (facts,) = run.load().tensors
    assert facts.kept is not None and facts.kept.requantised is not None
    assert (facts.kept.codes_unchanged is None) == (sides[0].encoding[-1] != sides[1].encoding[-1])
    assert (facts.kept.scales_unchanged is None) == (base == "MXFP8")


def test_what_a_device_does_not_decode_the_processor_does(on_host_gpu, tmp_path):
    """Words of one code each, with a scale and a zero point: more bytes than their values take."""
    on_host_gpu(1, Room.smallest())
    for number in (0, 1):
        rng = np.random.default_rng(number)
        one, other = LAYOUTS["3 bits in words, zero points for rows"], LAYOUTS["4 bits in words, zero points"]
        narrow, usual = one(rng, 40_000, 1), other(rng, 30, 64)
        tensors = usual.tensors | {"b" + name[1:]: tensor for name, tensor in narrow.tensors.items()}
        groups = {
            name: {"targets": [f"re:{name}.*"], "weights": sample.config["config_groups"]["group_0"]["weights"]}
            for name, sample in (("a", usual), ("b", narrow))
        }
        save(tmp_path / str(number), tensors, {"quant_method": "compressed-tensors", "config_groups": groups})
    plan = planning.prepare(str(tmp_path / "0"), str(tmp_path / "1"), options=Options(device="cuda"))
    assert plan.decoding_note == "quantised weights are decoded of 1 pair by cuda:0, of 1 pair by the processor"
    run_both(tmp_path / "0", tmp_path / "1", tmp_path, mask="bitwise")
    assert planning.prepare(str(tmp_path / "0"), str(tmp_path / "1"), options=Options(device="cpu")).decoding_note == ""


def moved(sides: list[Sample], rng) -> None:
    """The tuned side is the base but for a tenth of its bytes, scales included."""
    for name, tensor in sides[1].tensors.items():
        ours, theirs = (each.reshape(-1).view(torch.uint8) for each in (sides[0].tensors[name], tensor.contiguous()))
        kept = torch.from_numpy(rng.random(theirs.shape) < 0.9)
        sides[1].tensors[name] = torch.where(kept, ours, theirs).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("left", ["half", "nothing"])
def test_memory_that_others_take_while_a_run_is_under_way(libraries, tmp_path, monkeypatch, caplog, left):
    """Threads make do with less, to the same figures; where they cannot, the run ends, and leaves no run file."""
    room = Room(1 << 20, 4)
    memory = {"half": room.gpu_bytes - 1, "nothing": 1 << 20}[left]
    workers = []

    def worker():
        workers.append(CudaBackend(HostGpu(libraries, processors=1, memory=memory if workers else 1 << 40), room))
        return workers[-1]

    device = Device("cuda:0", worker, batches=True, decodes=True)
    real = planning.open_device
    monkeypatch.setattr(planning, "open_device", lambda options: device if options.device != "cpu" else real(options))
    sides = FIXTURES / "moe" / "base", FIXTURES / "moe" / "tuned"
    if left == "half":
        run_both(*sides, tmp_path, mask="bitwise", threads=2)
        assert "MiB of GPU memory are not free" in caplog.text
        return
    with pytest.raises(DeviceError, match="too little free GPU memory") as caught:
        ckptdiff.diff(*sides, out=tmp_path / "run.h5", device="cuda")
    assert "nvidia-smi" in caught.value.hint and caught.value.expected
    assert list(tmp_path.iterdir()) == [] and len(workers) == 1


def test_a_gpu_lost_in_mid_run_leaves_no_run_file(libraries, tmp_path, monkeypatch):
    class Lost(HostGpu):
        def synchronize(self, event):
            raise DeviceError("the GPU failed: cudaErrorDevicesUnavailable", found="cuda:0")

    device = Device("cuda:0", lambda: CudaBackend(Lost(libraries), Room.smallest()), batches=True)
    monkeypatch.setattr(Device, "warm_up", lambda *_: None)  # so that it is lost with the run under way
    monkeypatch.setattr(planning, "open_device", lambda options: device)
    sides = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    with pytest.raises(DeviceError, match="DevicesUnavailable"):
        ckptdiff.diff(*sides, out=tmp_path / "run.h5", device="cuda")
    assert list(tmp_path.iterdir()) == []
