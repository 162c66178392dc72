"""Recognise model files that are not read, and name them; they are never opened further."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["CONVERT_PICKLE", "foreign_codes", "foreign_files", "foreign_format", "pickled_weights"]

CONVERT_PICKLE = (
    "convert it yourself, ckptdiff reads torch's zip files alone, and runs no pickle: python -c"
    " 'import torch; from safetensors.torch import save_file;"
    ' state = torch.load("pytorch_model.bin", map_location="cpu", weights_only=True);'
    ' save_file({k: v.contiguous().clone() for k, v in state.items()}, "model.safetensors")\''
)
_NO_METADATA = "without .metadata, which is written last, they cannot be read: the save or the copy is incomplete"
_GGUF = (
    "GGUF is not supported: point ckptdiff at the safetensors files it was made from, or have transformers decode it:"
    " AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT)"
)
_FROM = "compare the checkpoint that it was quantised from"
_CODES = {
    "GPTQ": f"{_FROM}, or what GPTQModel decodes it to",
    "AWQ": f"{_FROM}, or convert it to what ckptdiff decodes: python -c 'from compressed_tensors.entrypoints.convert"
    " import AutoAWQConverter, convert_checkpoint;"
    ' convert_checkpoint("FOLDER", "OUT", AutoAWQConverter.from_pretrained("FOLDER"))\'',
}
"""What can be done about codes that are not decoded."""
_LFS = "fetch the file itself: git lfs pull"

# A header length below the format's limit has zeros in its last bytes, so none of these can begin a valid shard.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes", "give it a name that ends in .pt"),
    *((bytes([0x80, protocol]), "a pickle", CONVERT_PICKLE) for protocol in range(2, 6)),
    (b"GGUF", "a GGUF file", _GGUF),
    (b"version https://git-lfs", "a Git LFS pointer", _LFS),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "a run file is read by: ckptdiff show FILE"),
    (b'{"', "a JSON file", "name the .safetensors file, its .safetensors.index.json or their folder"),
)

_ENDINGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".bin", ".pt", ".pth", ".ckpt", ".pkl"), "pickles", CONVERT_PICKLE),
    ((".distcp",), "shards of torch.distributed.checkpoint without .metadata", _NO_METADATA),
    ((".gguf",), "GGUF files", _GGUF),
)
# Beside or below a model's own weights: the state of its training, and OpenVINO's copy of the model.
_NO_WEIGHTS = re.compile(
    r"(?:optim|optimizer|extra_state|scheduler|lr_scheduler|scaler|grad_scaler|sampler|dataloader|rng_state|random_states|training_args"
    r"|trainer_state|openvino_\w*model)(?:[_.-].*)?\.\w+|.*_optim(?:_states)?\.\w+|.*\.pkl"
)


def foreign_format(start: bytes) -> tuple[str, str] | None:
    """Recognise another format by a file's first bytes.

    Only meaningful for a file whose first eight bytes are no valid header length.

    Returns
    -------
    tuple of (str, str) or None
        What the file is, and what the user can do.
    """
    for signature, what, hint in _SIGNATURES:
        if start.startswith(signature):
            return what, hint
    return None


def foreign_files(names: Iterable[str]) -> tuple[str, list[str], str] | None:
    """Recognise another format by the names of a folder's files.

    Returns
    -------
    tuple of (str, list of str, str) or None
        What they are, which ones, and what the user can do. Pickles come before shards of
        torch.distributed.checkpoint, and those before GGUF.
    """
    listed = sorted(names)
    for endings, what, hint in _ENDINGS:
        found = [name for name in listed if name.lower().endswith(endings)]
        if found:
            return what, found, hint
    return None


def foreign_codes(names: Iterable[str]) -> str | None:
    """Recognise weights in codes that are not decoded, by the names of a checkpoint's tensors.

    Returns
    -------
    str or None
        What they are, GPTQ or AWQ, and what the user can do.
    """
    parts: dict[str, set[str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part in ("qweight", "qzeros", "scales", "g_idx"):
            parts.setdefault(module, set()).add(part)
    found = next((some for some in parts.values() if {"qweight", "scales"} <= some), None)
    if found is None:
        return None
    kind = "GPTQ" if "g_idx" in found else "AWQ" if "qzeros" in found else None
    return f"quantised with {kind}, whose codes are not decoded: {_CODES[kind]}" if kind else None


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are pickles of weights, as far as names tell."""
    found = foreign_files(names)
    if found is None or found[2] is not CONVERT_PICKLE:
        return []
    return [name for name in found[1] if not _NO_WEIGHTS.fullmatch(name)]
