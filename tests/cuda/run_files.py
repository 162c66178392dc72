"""Run files, dataset by dataset."""

import h5py
import numpy as np


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
