"""Bytes of every tensor of a checkpoint, as ckptdiff reads them, and of torch's tensors."""

import numpy as np
import torch

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.boxes import read_elements, read_weight
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.open_shards import open_shards


def bytes_of(tensor):
    """In the order of its elements."""
    packed = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return packed.view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def read(path, io="pread"):
    """By name: shape, and bytes read in one go."""
    checkpoint = open_checkpoint(path)
    found = {}
    with open_shards(io) as shards:
        for name, tensor in checkpoint.tensors.items():
            out = np.empty(tensor.nbytes, np.uint8)
            read_elements(shards, tensor, 0, tensor.numel, out)
            found[name] = tensor.shape, out
    return found


def assert_holds(path, state, io="pread"):
    """The checkpoint at a path holds these tensors, bit for bit, and no others."""
    found = read(path, io)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        shape, stored = found[name]
        assert shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(stored, bytes_of(tensor), name)


def assert_parts(path, name, state, pieces, boxes):
    """Parts of one tensor are those of torch's: elements (first, stop), and boxes of rows and columns of its matrix."""
    (tensor,) = (found for found in open_checkpoint(path).tensors.values() if found.name == name)
    size = DTYPES[tensor.dtype].bits // 8
    whole = bytes_of(state[name]).reshape(-1, size)
    with open_shards("pread") as shards:
        for first, stop in pieces:
            out = np.empty((stop - first) * size, np.uint8)
            read_elements(shards, tensor, first, stop, out)
            np.testing.assert_array_equal(out.reshape(-1, size), whole[first:stop])
        matrix = whole.reshape(-1, tensor.shape[-1], size)
        for rows, columns in boxes:
            codes = np.empty((rows[1] - rows[0], columns[1] - columns[0]), f"u{size}")
            read_weight(shards, tensor, rows, columns, codes)
            expected = np.ascontiguousarray(matrix[slice(*rows), slice(*columns)])
            np.testing.assert_array_equal(codes.view(np.uint8).reshape(expected.shape), expected)
