"""Pickles are read as data: what is known becomes values, all else is refused, and nothing is ever run."""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.checkpoint.unpickle import Made, Named, unpickle
from ckptdiff.errors import HeaderError

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
TEXT = (
    st.text(max_size=5) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.binary(max_size=5)
)
VALUES = st.recursive(
    TEXT,
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.lists(inside, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inside, max_size=4)
        | st.sets(st.integers(), max_size=3)
        | st.frozensets(st.text(max_size=2), max_size=3)
    ),
    max_leaves=20,
)


@given(value=VALUES, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values(value, protocol):
    assert unpickle(pickle.dumps(value, protocol), "f") == value


@given(value=VALUES, protocol=st.sampled_from(PROTOCOLS), cut=st.integers(0, 200))
def test_a_pickle_that_ends_early(value, protocol, cut):
    raw = pickle.dumps(value, protocol)[:-1]
    with pytest.raises(HeaderError, match="damaged"):
        unpickle(raw[: min(cut, len(raw))], "f")


@given(raw=st.binary(max_size=60))
def test_bytes_that_are_no_pickle_are_read_or_refused(raw):
    try:
        unpickle(raw, "f")
    except HeaderError as error:
        assert error.file == "f"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_torch_adds(protocol):
    saved = {
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "default": collections.defaultdict(list, {"a": [1]}),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "array": bytearray(b"\xff\x00"),
    }
    saved["ordered"]._metadata = {"": {"version": 1}}
    saved["self"] = saved
    found = unpickle(pickle.dumps(saved, protocol), "f")
    assert isinstance(found, dict)
    assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]
    assert (found["default"], found["size"], found["array"]) == ({"a": [1]}, (2, 3), b"\xff\x00")
    assert found["dtype"] == Named("torch.bfloat16")
    assert found["self"] is found
    made = unpickle(pickle.dumps(torch.device("cpu"), protocol), "f")
    assert isinstance(made, Made)
    assert (made.of, made.args) == ("torch.device", ("cpu",))


class Runs:
    """What an attacker pickles."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Runs(os.system, "touch PWNED"), "system"),
        (Runs(eval, "open('PWNED', 'w')"), "builtins.eval"),
        (Runs(subprocess.Popen, ["touch", "PWNED"]), ".Popen"),
        (Runs(torch.load, "PWNED"), "torch.serialization.load"),
        (io.BytesIO(b"x"), "_io.BytesIO"),
        (collections.Counter("a"), "collections.Counter"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
)
def test_other_classes_are_refused_by_name_and_not_run(tmp_path, monkeypatch, payload, named, protocol):
    monkeypatch.chdir(tmp_path)
    raw = pickle.dumps({"model": payload}, protocol)
    with pytest.raises(HeaderError, match="asks for a class") as caught:
        unpickle(raw, "f.pt")
    assert named in caught.value.found
    assert caught.value.file == "f.pt"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00a\x86R.",
        b"\x80\x02cbuiltins\ngetattr\nctorch\nSize\nX\x0b\x00\x00\x00__reduce_ex\x86R.",
        b"\x80\x02cbuiltins\ngetattr\nctorch.distributed._shard.sharded_tensor.api\nShardedTensor\nX\x08\x00\x00\x00__init__\x86R.",
    ],
)
def test_getattr_names_nested_classes_alone(raw):
    with pytest.raises(HeaderError, match="asks for a class"):
        unpickle(raw, "f")


@pytest.mark.parametrize(
    "raw",
    [
        b"(dp0\n.",  # protocol 0
        b"\x80\x02\x82\x01.",  # an extension registered in the process
        b"\x80\x04)}\x92.",  # NEWOBJ_EX
        b"\x80\x02]K\x01b.",  # a state for a list
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02(.",
        b"\x80\x02.",
        b"\x80\x02h\x07.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",  # a key whose hash would run out of stack
        b"\x80\x02\x8b" + struct.pack("<I", 5000) + b"\x01" * 5000 + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    ],
)
def test_instructions_that_make_no_sense(raw):
    with pytest.raises(HeaderError, match="damaged"):
        unpickle(raw, "f")


def test_a_memo_far_out_takes_no_memory():
    tracemalloc.start()
    try:
        assert unpickle(b"\x80\x02K\x05r\xff\xff\xff\xffj\xff\xff\xff\xff.", "f") == 5
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_nothing_of_torch_is_imported():
    raw = pickle.dumps({"size": torch.Size([1]), "dtype": torch.float32}, 2)
    code = (
        "import sys; from ckptdiff.checkpoint.unpickle import unpickle;"
        f" unpickle({raw!r}, 'f'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
