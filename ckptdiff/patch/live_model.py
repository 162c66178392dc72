"""Apply patches to the tensors of a live torch model, where they are."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import OptionError, PatchError
from ckptdiff.patch.chain import Bytes, Chain
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import required
from ckptdiff.patch.flat_link import read_flat
from ckptdiff.patch.link import Link
from ckptdiff.patch.opening import open_link, patch_kind
from ckptdiff.patch.spans import Piece, in_pieces, load_kernels, threads_for, work_in_order

if TYPE_CHECKING:
    import torch

__all__ = ["apply_to"]

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "bool": "BOOL",
} | {f"{sign}int{bits}": f"{letter}{bits}" for sign, letter in (("", "I"), ("u", "U")) for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, slots=True)
class _Live:
    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Any
    """Its bytes, as a flat tensor that shares them."""


@dataclass(frozen=True, slots=True)
class _Model:
    path: str
    tensors: Mapping[str, _Live]


class _LiveChain(Chain):
    """Takes what it begins with from tensors, not from files."""

    def _read(self, shards: OpenShards, name: str, place: int, codes: Bytes) -> None:
        del shards
        start = place * BLOCK_CODES * self.tensors[name].coding.width
        stored: Any = self.base.tensors[name]
        np.copyto(codes, stored.stored[start : start + codes.size].cpu().numpy())

    def _read_small(self, shards: OpenShards, names: Sequence[str], starts: Sequence[int], out: Bytes) -> None:
        for name, start in zip(names, starts, strict=True):
            self._read(shards, name, 0, out[start : start + self.tensors[name].nbytes])

    def _place_of(self, name: str) -> str:
        """Where the base's bytes of a tensor lie."""
        return self.base.path


def apply_to(
    state_dict: Mapping[str, torch.Tensor], patches: Sequence[str | os.PathLike[str]], *, threads: int = 0
) -> int:
    """Change the tensors of a model's state in place, as patches say that follow each other.

    Everything is made and every digest compared before the first value changes: a patch for other values, or a damaged
    one, changes nothing. Two names of one tensor are changed once.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor
        Contiguous tensors on any device, with the names, dtypes and shapes that the patches were made for; what else it
        holds stays as it is.
    patches : sequence of path-like
        In the order in which they were made, all of one format.
    threads : int
        0 stands for one per core.

    Returns
    -------
    int
        How many tensors changed.

    Raises
    ------
    OptionError
        A tensor is not contiguous, or no patch was given.
    PatchError
        A patch is damaged, was made for other values, or adds, drops, retypes or reshapes a tensor.

    Examples
    --------
    >>> from safetensors.torch import load_file
    >>> from ckptdiff import patch
    >>> base, tuned = "fixtures/tied/base", "fixtures/tied/base"
    >>> made = patch.make(base, tuned, "live.ckptdelta")
    >>> patch.apply_to(load_file(f"{base}/model.safetensors"), ["live.ckptdelta"])
    0
    """
    import torch

    required("xxhash")
    if not patches:
        raise OptionError("no patch was given", expected="one at least")
    with ExitStack() as stack, torch.no_grad():
        model = _Model("the model", {name: _live(name, one) for name, one in state_dict.items()})
        if patch_kind(patches[0]) == "flat":
            model = _named(model, read_flat(patches[0]).after)
        links: list[tuple[str, Link]] = []
        for path in patches:
            kind, opened = open_link(path, model, links)
            links.append((kind, stack.enter_context(opened)))
        for _, link in links:
            for one in link.delta.tensors.values():
                if one.state in ("whole", "lost"):
                    raise PatchError(
                        "a live model can only take other values",
                        file=link.path,
                        tensor=one.name,
                        expected="a patch that changes values alone",
                        found="a tensor that is lost" if one.state == "lost" else "a tensor that is new",
                    )
        chain = _LiveChain(_named(model, links[0][1].delta.tensors), [link for _, link in links])
        load_kernels(None)
        unchanged = chain.unchanged_names()
        changed = [name for name in chain.tensors if name not in unchanged]
        _pass(chain, [name for name, one in chain.tensors.items() if one.after], threads_for(threads), write=False)
        _pass(chain, changed, threads_for(threads), write=True)
    return len(changed)


def _pass(chain: _LiveChain, names: Sequence[str], threads: int, *, write: bool) -> None:
    chain.stop.clear()
    tensors: Any = chain.base.tensors
    if write:  # of two names of the same bytes, one
        names = list({(tensors[name].stored.data_ptr(), tensors[name].stored.device): name for name in names}.values())

    def made(pieces: list[Piece]) -> tuple[list[Piece], Bytes]:
        new = np.empty(chain.size_of(pieces), np.uint8)
        chain.make(shards, pieces, new)
        return pieces, new

    with open_shards("pread") as shards:
        codes = [(name, chain.tensors[name].codes) for name in names if chain.tensors[name].codes]
        for pieces, new in work_in_order(in_pieces(codes), made, threads, chain.stop, lambda: None):
            stop = 0
            for name, place in pieces if write else ():
                first = place * BLOCK_CODES * chain.tensors[name].coding.width
                start, stop = stop, stop + chain.size_of([(name, place)])
                _copy(tensors[name].stored[first : first + stop - start], new[start:stop])


def _copy(place: Any, new: Bytes) -> None:
    import torch

    place.copy_(torch.from_numpy(new))


def _named(model: _Model, names: Container[str]) -> Any:
    """The model without what a patch does not name."""
    return _Model(model.path, {name: one for name, one in model.tensors.items() if name in names})


def _live(name: str, tensor: torch.Tensor) -> _Live:
    import torch

    dtype = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or not tensor.is_contiguous():
        raise OptionError(
            "a tensor of the model cannot be patched",
            tensor=name,
            expected="a contiguous tensor of a dtype that checkpoints have",
            found=f"{tensor.dtype}, strides {tensor.stride()}",
        )
    return _Live(name, dtype, tuple(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8))
