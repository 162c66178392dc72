"""Place a tensor in its model by its name: layer, tower, module type and block.

What names mean is data (`families.py`). A name of no known form is ``other``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

from ckptdiff.checkpoint.families import BLOCK_OF_MODULE, FAMILIES, PLACES, TOWERS

__all__ = ["Place", "locate", "split_numbers"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits in a model.

    Attributes
    ----------
    layer : int or None
        Its number among the layers of its tower; None outside of them.
    tower : {"language", "encoder", "decoder", "vision", "audio", "projector"}
        Which part of the model; ``language`` for everything that is none of the others.
    module_type : str
        A key of `BLOCK_OF_MODULE`.
    block : str
        Its value there.
    """

    layer: int | None
    tower: str
    module_type: str
    block: str


_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.([0-9]{1,9})(?=\.|$)")
_NUMBER: Final = re.compile(r"(?:^|\.)[0-9]+(?=\.|$)")
_INNER: Final = re.compile(r"\.([0-9]{1,9})(?=\.)")
# What an adapter adds after the module's own name: q_proj.lora_A.default.weight belongs to q_proj.
_ADAPTER: Final = re.compile(
    r"\.(?:lora_|base_layer|modules_to_save|original_module|ia3_l|oft_|boft_|parametrizations\.weight).*$", re.DOTALL
)
_PARAMETER: Final = re.compile(
    r"weight|bias|gamma|beta|weight_[gv]|(?:weight|bias)_[ih]h_l[0-9]+(?:_reverse)?|weight_[a-z_]+"
    r"|(?:input_|output_|[qkv]_)?scales?(?:_inv)?|qweight|qzeros|g_idx"
    r"|running_(?:mean|var)|num_batches_tracked"
)
# Fused parameters carry their role in their own name: experts.gate_up_proj_blocks, attn.in_proj_weight.
_FUSED: Final = re.compile(r"(?!expert_bias|\w*correction_bias)(.+?)_(?:weight|bias|blocks|scales?(?:_inv)?)")
# What a model computes and some checkpoints store.
_BUFFER: Final = re.compile(r"(?:^|\.)att(?:n|ention)\.(?:masked_)?bias$|inv_freq$|relative_position_index$")

_FAMILIES: Final = tuple(
    (family.inside, module_type, pattern) for family in FAMILIES for module_type, pattern in family.types.items()
)
_PLACES: Final = {place: re.compile(pattern, re.I) for place, pattern in PLACES.items()}
_TOWERS: Final = {tower: re.compile(pattern, re.I) for tower, pattern in TOWERS.items()}


def locate(name: str, ndim: int | None = None) -> Place:
    """Find a tensor's place in its model by its name alone.

    Parameters
    ----------
    name : str
        The raw name.
    ndim : int, optional
        Dimensions of its module's weight: a ``gate`` that is no matrix is a gating factor, not a router, and what has
        three or more and no better name is a convolution.

    Returns
    -------
    Place
        Its layer is the first number after ``layers.``, ``h.``, ``blocks.``, ``block.`` or ``layer.``
        (:func:`~ckptdiff.checkpoint.places.locate_all` knows stages). Multi-head latent attention's ``q_a_proj`` and
        ``q_b_proj`` are ``q_proj``; its ``kv_a_proj_with_mqa`` and ``kv_b_proj`` are ``kv_proj``. A bias, a scale or
        an adapter belongs to its module.

    Examples
    --------
    >>> locate("model.layers.3.self_attn.k_proj.bias")
    Place(layer=3, tower='language', module_type='k_proj', block='attention')
    """
    layer = _LAYER.search(name)
    # Inside a layer, words of another tower say what it listens to, or which of its experts it asks.
    tower = _tower(_NUMBER.split(name, maxsplit=1)[0])
    module_type = _role(_NUMBER.sub("", name).removeprefix("."), None if ndim is None else min(ndim, 3))
    if (
        tower == "projector"
        and layer is None
        and BLOCK_OF_MODULE[module_type] not in ("attention", "norm", "embedding")
    ):
        module_type = "projector"
    return Place(int(layer[1]) if layer else None, tower, module_type, BLOCK_OF_MODULE[module_type])


def split_numbers(name: str) -> tuple[str, tuple[str, ...]]:
    """Part a name from the numbers in it: those of layers and experts, between dots or at its start.

    Returns
    -------
    str
        The name with ``*`` for each of them. Of those a model has few, however many tensors.
    tuple of str
        The numbers.

    Examples
    --------
    >>> split_numbers("h.0.mlp.experts.12.w1")
    ('h.*.mlp.experts.*.w1', ('0', '12'))
    """
    # A pattern that begins with a dot is found twice as fast as one that looks back for it.
    pieces = _INNER.split(f".{name}")
    return ".*".join(pieces[::2])[1:], tuple(pieces[1::2])


@lru_cache(maxsize=4096)
def _tower(name: str) -> str:
    parts = _ADAPTER.sub("", name).split(".")
    return next((tower for tower, known in _TOWERS.items() if any(map(known.fullmatch, parts))), "language")


@lru_cache(maxsize=4096)
def _role(name: str, ndim: int | None) -> str:
    """Module type of a name without its numbers: a model has few of those, however many layers."""
    parts = _ADAPTER.sub("", name).split(".")
    is_bias = parts[-1].endswith("bias")
    if _BUFFER.search(".".join(parts)):
        return "other"
    if len(parts) > 1 and _PARAMETER.fullmatch(parts[-1]):
        parts = parts[:-1]
    elif fused := _FUSED.fullmatch(parts[-1]):
        parts = [*parts[:-1], fused[1]]
    path, place = ".".join(parts), _innermost(parts[:-1])
    for inside, module_type, pattern in _FAMILIES:
        if inside in ("", place or "nowhere") and _compiled(pattern).search(path):
            is_factor = module_type == "router" and parts[-1] == "gate" and ndim is not None and ndim < 2
            return "other" if is_factor and not is_bias else module_type
    place = place or _innermost(parts[-1:])
    if place in BLOCK_OF_MODULE:
        return place
    return "conv" if ndim is not None and ndim > 2 else "embed_tokens" if place == "embedding" else "other"


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of the table, once it is needed: of one model that is a part of them."""
    return re.compile(rf"(?:^|\.)(?:{pattern})(?:\.(?:linear|conv(?:olution|1d)?|dense))?$", re.I)


def _innermost(parts: list[str]) -> str:
    """The place that the last telling part names; empty if none does."""
    for part in reversed(parts):
        for place, pattern in _PLACES.items():
            if pattern.fullmatch(part):
                return place
    return ""
