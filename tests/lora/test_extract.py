from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from told_stages import told_stages

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.checkpoint.checkpoint import open_pair
from ckptdiff.cli import main
from ckptdiff.errors import PairingError, RunFileError
from ckptdiff.events import Event, Note, Started
from ckptdiff.lora.extract import Extraction, extract_lora

BF16 = ml_dtypes.bfloat16
NAMES = {
    "model.layers.0.mlp.up_proj.weight": (90, 40),
    "model.layers.0.mlp.down_proj.weight": (40, 90),
    "model.layers.0.self_attn.q_proj.weight": (48, 48),
    "model.layers.0.self_attn.q_proj.bias": (48,),
    "model.embed_tokens.weight": (60, 40),
    "transformer.h.0.attn.c_attn.weight": (30, 90),
    "model.mlp.experts.down_proj": (2, 8, 9),
    "model.kernel.weight": (2, 3, 4),
    "model.norm.weight": (40,),
    "steps": (3, 3),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pair")
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in NAMES.items()}
    tuned = {
        name: values + 1e-3 * rng.standard_normal(values.shape).astype(np.float32) for name, values in base.items()
    }
    tuned["model.norm.weight"] = base["model.norm.weight"]
    base["steps"] = np.zeros((3, 3), np.int64)
    tuned["steps"] = np.ones((3, 3), np.int64)
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


def product(folder: Path, name: str) -> np.ndarray:
    """What PEFT adds to a tensor: to that of Conv1D turned, to that of experts for each of them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    module = name.removesuffix(".weight").removesuffix(".down_proj") if ".experts." in name else name[:-7]
    up, down = (tensors[f"base_model.model.{module}.{part}.weight"].astype(np.float64) for part in ("lora_B", "lora_A"))
    if ".experts." in name:
        return np.einsum("ore,eri->eoi", up.reshape(len(up), -1, 2), down.reshape(2, -1, down.shape[1]))
    return (up @ down).T if "c_attn" in name else up @ down


def delta_of(pair: tuple[str, str], name: str) -> np.ndarray:
    base, tuned = map(load_file, pair)
    return (tuned[name] - base[name]).astype(np.float64)


def rows_of(made: Extraction) -> dict[str, tuple[int, str | None]]:
    return {tensor.name: (tensor.rank, tensor.reason) for tensor in made.tensors}


def test_each_checkpoint_is_opened_once(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_it(base: str, tuned: str, *how: bool) -> tuple[Checkpoint, Checkpoint]:
        opened.extend([base, tuned])
        return open_pair(base, tuned, *how)

    monkeypatch.setattr("ckptdiff.run.planning.open_pair", open_it)
    extract_lora(*pair, tmp_path / "adapter", rank=4)
    assert opened == list(pair)


def test_factors_are_the_best_ones(pair: tuple[str, str], tmp_path: Path) -> None:
    made = extract_lora(*pair, tmp_path / "adapter", rank=7)
    for tensor in made.tensors:
        if not tensor.rank:
            continue
        left, values, right = np.linalg.svd(delta_of(pair, tensor.name), full_matrices=False)
        best = (left[..., :7] * values[..., None, :7]) @ right[..., :7, :]
        assert np.allclose(product(tmp_path / "adapter", tensor.name), best, atol=1e-8)
        assert tensor.rank == 7
        assert tensor.lost == pytest.approx(np.sum(values[..., 7:] ** 2) / np.sum(values**2), rel=1e-5, abs=1e-7)
    total = sum(np.sum(delta_of(pair, tensor.name) ** 2) for tensor in made.tensors)
    lost = sum(tensor.lost * np.sum(delta_of(pair, tensor.name) ** 2) for tensor in made.tensors)
    assert made.lost == pytest.approx(lost / total, rel=1e-5)


def test_what_an_adapter_cannot_hold_is_listed(pair: tuple[str, str], tmp_path: Path) -> None:
    made = extract_lora(*pair, tmp_path / "adapter", rank=4)
    assert rows_of(made) == {
        "model.layers.0.mlp.up_proj.weight": (4, None),
        "model.layers.0.mlp.down_proj.weight": (4, None),
        "model.layers.0.self_attn.q_proj.weight": (4, None),
        "model.layers.0.self_attn.q_proj.bias": (0, "a bias"),
        "model.embed_tokens.weight": (0, "an embedding"),
        "transformer.h.0.attn.c_attn.weight": (4, None),
        "model.mlp.experts.down_proj": (4, None),
        "model.kernel.weight": (0, "not a matrix"),
    }
    assert made.unchanged == 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_parameters"] == ["model.mlp.experts.down_proj"]
    assert sorted([*config["target_modules"], "model.mlp.experts.down_proj"]) == sorted(
        name.removesuffix(".weight") for name, (rank, _) in rows_of(made).items() if rank
    )


def test_energy_chooses_the_smallest_rank(pair: tuple[str, str], tmp_path: Path) -> None:
    made = extract_lora(*pair, tmp_path / "adapter", rank=128, energy=0.6)
    for tensor in made.tensors:
        if tensor.rank:
            values = np.linalg.svd(delta_of(pair, tensor.name), compute_uv=False)
            shares = np.cumsum(values**2, -1) / np.sum(values**2, -1, keepdims=True)
            assert tensor.rank == np.max(np.sum(shares < 0.6, -1)) + 1  # of experts, the largest
            assert tensor.lost <= 0.4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, rank in config["rank_pattern"].items():
        assert rank == config["alpha_pattern"][name] != config["r"]


def test_a_large_update_goes_through_the_krylov_space(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((900, 700)).astype(BF16)
    lead = rng.standard_normal((900, 5)) @ rng.standard_normal((5, 700))
    moved = (weights.astype(np.float64) + 0.05 * lead).astype(BF16)
    save_file({"a.weight": weights}, tmp_path / "base.safetensors")
    save_file({"a.weight": moved}, tmp_path / "tuned.safetensors")
    made = extract_lora(str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), tmp_path / "x", rank=8)
    values = np.linalg.svd(moved.astype(np.float64) - weights.astype(np.float64), compute_uv=False)
    assert made.tensors[0].lost == pytest.approx(np.sum(values[8:] ** 2) / np.sum(values**2), abs=2e-6)


def test_nothing_is_left_behind_on_failure(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(PairingError, match="no update"):
        extract_lora(pair[0], pair[0], tmp_path / "adapter", rank=4)
    assert not list(tmp_path.iterdir())
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RunFileError, match="the output exists"):
        extract_lora(*pair, tmp_path / "adapter", rank=4)
    with pytest.raises(RunFileError, match="folder does not exist"):
        extract_lora(*pair, tmp_path / "no" / "adapter", rank=4)


def test_nan_is_left_out(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((9, 9)).astype(np.float32)
    moved = 2 * weights
    strange = moved.copy()
    strange[1, 1] = np.nan
    save_file({"a.weight": weights, "b.weight": weights + 1}, tmp_path / "base.safetensors")
    save_file({"a.weight": moved, "b.weight": strange}, tmp_path / "tuned.safetensors")
    made = extract_lora(str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), tmp_path / "x", rank=9)
    assert rows_of(made) == {"a.weight": (9, None), "b.weight": (0, "NaN or Inf in it")}


def test_command_line(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", *pair, "-o", str(tmp_path / "one"), "--rank", "4"]) == 0
    assert "an embedding" in capsys.readouterr().out
    assert main(["lora", *pair, "-o", str(tmp_path / "two"), "--energy", "0.5", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in document["tensors"] if row["rank"]} == {
        name for name in NAMES if name.endswith(("proj.weight", "c_attn.weight", "down_proj"))
    }
    for bad in (["--rank", "0"], ["--energy", "1.5"], []):
        assert main(["lora", *pair, "-o", str(tmp_path / "three"), *bad]) == 2
    assert not (tmp_path / "three").exists()


def test_peft_loads_it_and_computes_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def model() -> torch.nn.Module:
        layers = [torch.nn.Linear(24, 60), torch.nn.Tanh(), torch.nn.Linear(60, 16)]
        return torch.nn.Sequential(torch.nn.Embedding(10, 24), *layers)

    base, tuned = model(), model()
    tuned.load_state_dict({k: v + 0.1 * torch.randn_like(v) if v.ndim > 1 else v for k, v in base.state_dict().items()})
    tuned[0].load_state_dict(base[0].state_dict())
    for name, side in (("base", base), ("tuned", tuned)):
        save_file({k: v.numpy() for k, v in side.state_dict().items()}, tmp_path / f"{name}.safetensors")
    sides = str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")
    extract_lora(*sides, tmp_path / "adapter", rank=30, energy=0.8)
    tokens = torch.arange(10)
    truncated = model()
    state = base.state_dict()
    for name in ("1.weight", "3.weight"):
        state[name] = state[name] + torch.from_numpy(product(tmp_path / "adapter", name)).float()
    truncated.load_state_dict(state)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(tokens), truncated(tokens), atol=1e-5)
        assert not torch.allclose(adapted(tokens), tuned(tokens), atol=1e-3)


def test_a_listener_follows_the_comparison_and_every_tensor(pair: tuple[str, str], tmp_path: Path) -> None:
    told: list[Event] = []
    made = extract_lora(*pair, tmp_path / "adapter", rank=4, listener=told.append)
    assert any(isinstance(event, Started) for event in told)
    stages = list(told_stages(told))
    assert stages[stages.index("comparing") :] == ["comparing", "factors", "writing"]
    notes = [event.text.partition(":")[0] for event in told if isinstance(event, Note)]
    assert notes[-len(made.tensors) :] == [tensor.name for tensor in made.tensors]


def test_verbose_tells_of_every_tensor_and_quiet_writes_files_only(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", *pair, "-o", str(tmp_path / "one"), "--rank", "4", "-v"]) == 0
    told = capsys.readouterr().err
    assert "ckptdiff: model.embed_tokens.weight: left out: an embedding\n" in told
    assert "ckptdiff: model.layers.0.mlp.up_proj.weight: rank 4, " in told
    listed = tmp_path / "list.json"
    command = ["lora", *pair, "-o", str(tmp_path / "two"), "--rank", "4", "-q", "--format", "json", "-O", str(listed)]
    assert main(command) == 0
    assert capsys.readouterr() == ("", "") and json.loads(listed.read_text())["schema"] == "ckptdiff.lora/1"
