"""What an assembled tensor holds, by NumPy: the oracle of layouts."""

import numpy as np

from ckptdiff.checkpoint.header import Shard, TensorInfo

SHARD = Shard("model.safetensors", 0, 0, 0, 0, "", {})
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def described(arrays):
    """Headers of arrays, by name."""
    return {
        name: TensorInfo(name, DTYPES[array.dtype.name], array.shape, SHARD, 0, array.nbytes)
        for name, array in arrays.items()
    }


def assembled_values(assembled, arrays, *, in_part=False):
    """Put an assembled tensor together; every element is in one piece, or in none and NaN."""
    whole = np.full(assembled.shape, np.nan)
    times = np.zeros(assembled.shape, int)
    for piece in assembled.pieces:
        box = arrays[piece.source.name][tuple(slice(*one) for one in piece.tuned_index)]
        if piece.transposed:
            box = box.swapaxes(-1, -2)
        target = tuple(slice(*one) for one in piece.base_index)
        assert [size for size in box.shape if size > 1] == [size for size in whole[target].shape if size > 1]
        whole[target] = box.reshape(whole[target].shape)
        times[target] += 1
    assert times.max() == 1 and (in_part or times.min() == 1)
    assert assembled.whole == (times.min() == 1)
    return whole


def check(assembly, base, tuned):
    """Everything of the base is found, with its values, and everything of the tuned side is used."""
    assert assembly.renamed.keys() | assembly.assembled.keys() == base.keys() == assembly.rules.keys()
    for name, array in base.items():
        if name in assembly.renamed:
            np.testing.assert_array_equal(tuned[assembly.renamed[name]], array, err_msg=name)
        else:
            np.testing.assert_array_equal(assembled_values(assembly.assembled[name], tuned), array, err_msg=name)
    assert assembly.used == tuned.keys() and not assembly.partly
