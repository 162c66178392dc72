"""Flat patches, read with safetensors, torch and JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from stored_tensors import Stored, random_tensor, read, write
from test_delta_directory import BLOCK, ROOT, bytes_of, refused

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import OptionError


def sides(folder: Path) -> list[Path]:
    """Tensors of floating dtypes, of one block and several, of which one stays."""
    rng = np.random.default_rng(4)
    shapes = {
        "small": ("F32", (40, 3)),
        "half": ("F16", (8, 8)),
        "wide": ("BF16", (2 * BLOCK + 9,)),
        "f8": ("F8_E5M2", (64,)),
    }
    base = {name: random_tensor(rng, *shape) for name, shape in shapes.items()}
    for name, one in base.items():
        data = np.frombuffer(one.data, np.uint8).copy()
        width = len(data) // int(np.prod(one.shape))
        data[width - 1 :: width] = 0x3C  # finite, in all of them
        base[name] = one._replace(data=data.tobytes())
    base["same"] = random_tensor(rng, "BF16", (5,))
    tuned = dict(base)
    for name, (_, shape) in shapes.items():
        data = np.frombuffer(base[name].data, np.uint8).copy()
        width = len(data) // int(np.prod(shape))
        moved = rng.random(data.size) < 0.05
        moved[width - 1 :: width] = False
        data[moved] ^= 1
        tuned[name] = base[name]._replace(data=data.tobytes())
    data = bytearray(tuned["f8"].data)
    data[7:9] = bytes([0x80, 0x3C])  # a negative zero, and a one
    tuned["f8"] = tuned["f8"]._replace(data=bytes(data))
    return [write(folder / f"{k}.safetensors", one) for k, one in enumerate((base, tuned))]


def set_values(weights: dict[str, bytes], path: Path) -> set[str]:
    """What an engine does: ``flat[indices] = values``, of the shapes in the file; returns what it set."""
    with safe_open(path, framework="pt") as held:
        facts, names = held.metadata(), set(held.keys())
    tensors, shapes = load_file(path), json.loads(facts["shapes"])
    for name, shape in shapes.items():
        if name in names:
            assert list(tensors[name].shape) == shape
            new = tensors[name].reshape(-1).view(torch.uint8)
        else:
            indices, values = tensors[f"{name}.indices"], tensors[f"{name}.values"]
            assert indices.dtype == torch.int32 and indices.unique().numel() == indices.numel() == values.numel()
            assert not values.float().isnan().any() and (indices.diff() > 0).all()
            rows = torch.frombuffer(bytearray(weights[name]), dtype=torch.uint8).view(-1, values.element_size())
            rows[indices.long()] = values.view(torch.uint8).view(-1, values.element_size())
            new = rows.reshape(-1)
        assert json.loads(facts["before"])[name] == xxhash.xxh3_128_hexdigest(weights[name])
        weights[name] = new.numpy().tobytes()
    for name, data in weights.items():
        assert json.loads(facts["after"])[name] == xxhash.xxh3_128_hexdigest(data)
    return set(shapes)


def test_an_engine_sets_its_values(tmp_path: Path) -> None:
    base, tuned = sides(tmp_path)
    made = patch.make_flat(base, tuned, tmp_path / "flat.safetensors")
    weights = bytes_of(base)
    assert set_values(weights, tmp_path / "flat.safetensors") == {"small", "half", "wide", "f8"}
    assert weights == bytes_of(tuned)
    assert made.size == (tmp_path / "flat.safetensors").stat().st_size and made.changed_tensors == 4
    patch.make_flat(base, tuned, tmp_path / "again.safetensors", threads=1)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "flat.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_new_nans_are_refused_or_sent_whole(dtype: str, tmp_path: Path) -> None:
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16}
    kind |= {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    values = torch.linspace(-2, 2, 40).to(kind[dtype])
    for k, new in enumerate((1.0, float("inf"), float("nan"), -float("nan"))):
        after = values.clone()
        after[3] = new
        made = [Stored(dtype, (40,), one.view(torch.uint8).numpy().tobytes()) for one in (values, after)]
        other = random_tensor(np.random.default_rng(1), "F32", (9,))
        base, tuned = (write(tmp_path / f"{k}-{i}.safetensors", {"a": one, "z": other}) for i, one in enumerate(made))
        target = tmp_path / f"{k}.out.safetensors"
        if after.float().isnan().any():
            refused(lambda b=base, t=tuned, o=target: patch.make_flat(b, t, o), "NaN", "--dense-rest", "tensor:   a")
            assert not target.exists()
        patch.make_flat(base, tuned, target, dense_rest=True)
        weights = bytes_of(base)
        assert set_values(weights, target) == {"a"}
        assert weights == bytes_of(tuned)
        assert (list(read(target)) == ["a"]) == bool(after.float().isnan().any())


def test_whole_numbers_are_refused_or_sent_whole(tmp_path: Path) -> None:
    base, tuned = (ROOT / "fixtures" / "llama" / name for name in ("base", "tuned"))
    held, rng = {"ids": random_tensor(np.random.default_rng(0), "I64", (3, 4))}, np.random.default_rng(2)
    files = [write(tmp_path / "0.safetensors", held)]
    files.append(write(tmp_path / "1.safetensors", {"ids": random_tensor(rng, "I64", (3, 4))}))
    refused(lambda: patch.make_flat(*files, tmp_path / "f.safetensors"), "not a floating one", "tensor:   ids")
    refused(lambda: patch.make_flat(*files, tmp_path / "f.bin"), ".safetensors", kind=OptionError)
    assert {path.name for path in tmp_path.iterdir()} == {"0.safetensors", "1.safetensors"}
    words = ["patch", "make", str(files[0]), str(files[1]), "-o", str(tmp_path / "f.safetensors"), "--format", "flat"]
    assert main(words) == 2
    assert main([*words, "--dense-rest"]) == 0
    assert read(tmp_path / "f.safetensors") == {"ids": read(files[1])["ids"]}
    assert (
        main(["patch", "make", str(base), str(tuned), "-o", str(tmp_path / "l.safetensors"), "--format", "flat"]) == 0
    )
    weights = bytes_of(base)
    set_values(weights, tmp_path / "l.safetensors")
    assert weights == bytes_of(tuned)
    refused(lambda: patch.make_flat(base, files[0], tmp_path / "g.safetensors"), "only say how values change")
