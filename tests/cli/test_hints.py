"""An error says what to do next, where a newcomer takes one kind of file for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptdiff.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, an adapter beside it, a run file with spectra and a track file."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = rng.standard_normal((24, 16)).astype(np.float32)
    save_file({name: base}, folder / "base.safetensors")
    save_file({name: base * np.float32(1.01)}, folder / "tuned.safetensors")
    factors = {
        f"base_model.model.{name.replace('.weight', part)}": base for part in (".lora_A.weight", ".lora_B.weight")
    }
    save_file(factors, folder / "adapter_model.safetensors")
    packed, scales = np.zeros((2, 24), np.int32), np.ones((1, 24), np.float16)
    module = name.removesuffix(".weight")
    for kind, more in (("awq", {}), ("gptq", {f"{module}.g_idx": np.zeros(16, np.int32)})):
        codes = {f"{module}.qweight": packed, f"{module}.qzeros": packed[:1], f"{module}.scales": scales}
        save_file({**codes, **more}, folder / f"{kind}.safetensors")
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    sides = [str(folder / f"{side}.safetensors") for side in ("base", "tuned")]
    assert main(["diff", *sides, "-o", str(folder / "run.h5"), "--spectra", "randomized", "-q"]) == 1
    assert main(["track", *sides, "-o", str(folder / "track.h5"), "-O", str(folder / "list.txt")]) == 0
    assert main(["lora", *sides, "-o", str(folder / "lora"), "--rank", "2", "-q"]) == 0
    return folder


@pytest.mark.parametrize(("command", "hint"), [
    ("show track.h5", "ckptdiff track {}/track.h5 prints it"),
    ("show base.safetensors", "ckptdiff diff BASE TUNED -o RUN.h5 makes one"),
    ("track run.h5", "ckptdiff show {}/run.h5 prints it"),
    ("spectra add run.h5", "for others compare again: ckptdiff diff BASE TUNED --spectra exact -o RUN.h5"),
    ("mask export run.h5 nothing -o masks.npz", "ckptdiff mask list {}/run.h5"),
    ("lora base.safetensors tuned.safetensors -o lora --rank 2", "remove it, or choose another name"),
    ("mask export run.h5 -o lora --layout shira --rank 2", "remove it, or choose another name"),
    ("diff base.safetensors awq.safetensors", "{}/awq.safetensors is quantised with AWQ, whose codes are not decoded"),
    ("diff base.safetensors gptq.safetensors", "{}/gptq.safetensors is quantised with GPTQ, whose codes are not decod"),
    ("diff base.safetensors model.gguf", "GGUF is not supported: point ckptdiff at the safetensors files it was made"),
    ("diff base.safetensors adapter_model.safetensors", "{}/adapter_model.safetensors is an adapter: merge it"),
])  # fmt: skip
def test_what_to_do_next(files: Path, command: str, hint: str, cli) -> None:
    words = [str(files / word) if "." in word or word == "lora" else word for word in command.split()]
    words[0] = command.split()[0]
    code, out, err = cli(*words)
    assert code == 2 and out == ""
    assert f"try:      {hint.format(files)}" in err
