import errno
import hashlib
import json
import os
import socket
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import raw, write
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from ckptdiff.checkpoint import DTYPES, Kind, read_header
from ckptdiff.checkpoint import regular_file as regular_file_module
from ckptdiff.errors import ChangedFileError, CheckpointError, HeaderError


def u8(start, stop, shape=None):
    return {"dtype": "U8", "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.fixture
def refusal(tmp_path):
    """The HeaderError of a file of these bytes."""

    def refuse(content):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(HeaderError) as caught:
            read_header(path)
        assert caught.value.file == str(path)
        return caught.value

    return refuse


class TestReading:
    def test_it_finds_the_bytes_that_the_safetensors_library_wrote(self, tmp_path):
        random = np.random.default_rng(0)
        arrays = {
            "matrix": random.standard_normal((5, 7)).astype(np.float32),
            "scalar": np.array(1.5, np.float64),
            "empty": np.zeros((0, 3), np.float16),
            "bf16": random.standard_normal((3, 3, 3)).astype(ml_dtypes.bfloat16),
            "ids": np.arange(9, dtype=np.int64),
        }
        path = tmp_path / "a.safetensors"
        save_file(arrays, path, metadata={"format": "np"})
        shard, tensors = read_header(path)
        content = path.read_bytes()
        assert {tensor.name for tensor in tensors} == set(arrays)
        assert shard.metadata == {"format": "np"}
        with safe_open(path, "numpy") as library:
            for tensor in tensors:
                array = arrays[tensor.name]
                assert tensor.shape == array.shape
                assert tensor.numel == array.size
                assert tensor.nbytes == array.nbytes
                assert content[tensor.start : tensor.stop] == array.tobytes()
                assert tensor.dtype == library.get_slice(tensor.name).get_dtype()
                assert tensor.kind is (Kind.INTEGER if tensor.name == "ids" else Kind.FLOAT)

    def test_the_shard_identifies_the_file(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write(path, {"a": ("F32", (4,))})
        shard, _ = read_header(path)
        status, content = path.stat(), path.read_bytes()
        assert (shard.path, shard.size, shard.mtime_ns) == (str(path), len(content), status.st_mtime_ns)
        assert (shard.device, shard.inode) == (status.st_dev, status.st_ino)
        header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
        assert shard.header_sha256 == hashlib.sha256(header).hexdigest()
        assert hash(shard) == hash(read_header(path)[0])

    def test_tensors_come_in_the_order_of_their_bytes(self, tmp_path):
        path = tmp_path / "a.safetensors"
        header = {"z": u8(0, 2), "b": u8(3, 3), "m": u8(2, 3), "a": u8(3, 3), "c": u8(3, 4)}
        path.write_bytes(raw(header, b"1234"))
        assert [tensor.name for tensor in read_header(path)[1]] == ["z", "m", "a", "b", "c"]

    def test_a_symbolic_link_has_the_region_of_its_target(self, tmp_path):
        target = tmp_path / "blob"
        write(target, {"a": ("F32", (4,)), "b": ("F32", (4,))})
        link = tmp_path / "link.safetensors"
        link.symlink_to(target)
        shard, (a, b) = read_header(link)
        assert shard.path == str(link)
        assert [a.region, b.region] == [tensor.region for tensor in read_header(target)[1]]
        assert a.region != b.region

    def test_no_tensors(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw({}))
        assert read_header(path)[1] == ()

    @pytest.mark.parametrize("padding", [b" ", b"      ", b"\n\t "])
    def test_white_space_after_the_header_is_padding(self, tmp_path, padding):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw(json.dumps({"a": u8(0, 1)}).encode() + padding, b"x"))
        (tensor,) = read_header(path)[1]
        assert path.read_bytes()[tensor.start : tensor.stop] == b"x"

    @pytest.mark.parametrize("name", ["", "a/b/../c", "\x1b[31mred", "<b>", "\x7f\u202e", "😀", "a\nb"])
    def test_strange_names_are_kept_raw(self, tmp_path, name):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw({name: u8(0, 1)}, b"x"))
        assert read_header(path)[1][0].name == name


class TestFilesThatAreNoShards:
    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "the file is empty"),
            (b"1234567", "the file is too short"),
            (struct.pack("<Q", 100), "the header does not end inside the file"),
            (struct.pack("<Q", 1000) + b'{"weight":{"dtype":"F32"', "the header does not end inside the file"),
            (struct.pack("<Q", 100_000_001) + b"{}", "the header length is over the limit"),
            (struct.pack("<Q", 2**64 - 1) + b"{}", "the header length is over the limit"),
            (struct.pack("<Q", 0), "the header does not begin with '{'"),
        ],
    )
    def test_lengths(self, refusal, content, problem):
        assert problem in refusal(content).problem

    def test_a_published_malformed_file(self, refusal):
        """safetensors_abuse_attempt_1: a header length of 1000 in a file of 88 bytes."""
        header = b'{"weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}  '
        error = refusal(struct.pack("<Q", 1000) + header + bytes(16))
        assert error.expected == "at most 80 bytes"
        assert error.found == "a header length of 1000 bytes"

    def test_a_header_over_the_limit_is_not_read(self, tmp_path, monkeypatch):
        path = tmp_path / "big.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 150_000_000) + b"{")
            file.truncate(200_000_000)
        asked = []
        read_bytes = regular_file_module.read_bytes
        monkeypatch.setattr(
            "ckptdiff.checkpoint.header.read_bytes",
            lambda descriptor, count, *rest: asked.append(count) or read_bytes(descriptor, count, *rest),
        )
        with pytest.raises(HeaderError, match="over the limit"):
            read_header(path)
        assert sum(asked) <= 100

    @pytest.mark.parametrize(
        ("content", "found", "hint"),
        [
            (b"PK\x03\x04" + bytes(range(1, 100)), "a zip archive", "ends in .pt"),
            (b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq", "a pickle", "safetensors.torch"),
            (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00\x00", "a GGUF file", "not supported"),
            (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
            (b"\x89HDF\r\n\x1a\n" + bytes(8), "an HDF5 file", "ckptdiff show"),
            (b'{"weight_map": {}}', "a JSON file", "index.json"),
        ],
    )
    def test_other_formats_are_named(self, refusal, content, found, hint):
        error = refusal(content)
        assert error.problem == "not a safetensors file"
        assert found in error.found
        assert hint in error.hint

    def test_a_header_whose_length_looks_like_a_pickle_is_read(self, tmp_path):
        path = tmp_path / "a.safetensors"
        text = json.dumps({"a": u8(0, 1)}).encode()
        path.write_bytes(raw(text + b" " * (0x280 - len(text)), b"x"))
        assert path.read_bytes().startswith(b"\x80\x02")
        assert len(read_header(path)[1]) == 1

    def test_a_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="not a regular file") as caught:
            read_header(tmp_path)
        assert caught.value.found == "a directory"

    def test_a_fifo_does_not_block(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(CheckpointError, match="not a regular file") as caught:
            read_header(tmp_path / "fifo")
        assert "FIFO" in caught.value.found

    def test_a_path_that_becomes_a_fifo_does_not_block(self, tmp_path, monkeypatch):
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "file").touch()
        regular = (tmp_path / "file").stat()
        monkeypatch.setattr(regular_file_module, "stat_path", lambda path: regular)
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(tmp_path / "fifo")

    def test_a_device(self):
        with pytest.raises(CheckpointError, match="not a regular file") as caught:
            read_header("/dev/zero")
        assert "device" in caught.value.found

    def test_a_socket(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind("socket")
            with pytest.raises(CheckpointError, match="not a regular file") as caught:
                read_header("socket")
        assert caught.value.found == "a socket"

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            read_header(tmp_path / "none.safetensors")

    def test_a_dangling_link(self, tmp_path):
        (tmp_path / "link").symlink_to("blob")
        with pytest.raises(CheckpointError, match="leads nowhere") as caught:
            read_header(tmp_path / "link")
        assert "blob" in caught.value.found

    def test_a_link_to_itself(self, tmp_path):
        (tmp_path / "link").symlink_to("link")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(tmp_path / "link")

    @pytest.mark.parametrize("path", ["a\0b", "\ud800"])
    def test_an_impossible_path(self, path):
        with pytest.raises(CheckpointError, match="not a possible path"):
            read_header(path)

    def test_no_permission(self, public_dir, error_of_nobody):
        path = public_dir / "a.safetensors"
        write(path, {"a": ("F32", (1,))})
        assert error_of_nobody(lambda: read_header(path)) == ""
        path.chmod(0)
        text = error_of_nobody(lambda: read_header(path))
        assert text.startswith("CheckpointError: no permission to read")
        assert str(path) in text

    @pytest.mark.parametrize("call", ["open", "pread"])
    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
    def test_a_failing_disk_is_an_error_about_the_file(self, tmp_path, monkeypatch, call, number):
        path = write(tmp_path / "a.safetensors", {"a": ("F32", (1,))})

        def fail(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(regular_file_module.os, call, fail)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert caught.value.file == path
        assert isinstance(caught.value.__cause__, OSError)

    def test_a_file_that_shrinks_under_the_reader(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(b"1234")
        with (
            regular_file_module.open_regular(str(path)) as (descriptor, _),
            pytest.raises(ChangedFileError, match="shrank") as caught,
        ):
            regular_file_module.read_bytes(descriptor, 10, 1, str(path))
        assert caught.value.found == "3"


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


class TestHeaderText:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            (b'{"a\xff":' + ENTRY + b"}", "is not UTF-8"),
            (b'{"a\xed\xa0\x80":' + ENTRY + b"}", "is not UTF-8"),
            (b'{"a":' + ENTRY, "is not valid JSON"),
            (b'{"a":' + ENTRY + b"}\0\0", "is not valid JSON"),
            (b'{"a":' + ENTRY + b"}{}", "is not valid JSON"),
            (b'{"a\nb":' + ENTRY + b"}", "is not valid JSON"),
            (b'{"a":' + ENTRY[:-1] + b',"x":NaN}}', "is not valid JSON"),
            (b'{"a":' + ENTRY[:-1] + b',"x":-Infinity}}', "is not valid JSON"),
            (b"[]", "does not begin with '{'"),
            (b'"a"', "does not begin with '{'"),
            (b' {"a":' + ENTRY + b"}", "does not begin with '{'"),
            (b'\xef\xbb\xbf{"a":' + ENTRY + b"}", "does not begin with '{'"),
            (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "repeats a key"),
            (b'{"a":' + ENTRY + b',"\\u0061":' + ENTRY + b"}", "repeats a key"),
            (b'{"a":' + ENTRY[:-1] + b',"dtype":"U8"}}', "repeats a key"),
            (b'{"a":' + ENTRY[:-1] + b',"x":[{"y":1,"y":2}]}}', "repeats a key"),
            (b'{"__metadata__":{"k":"1","k":"2"},"a":' + ENTRY + b"}", "repeats a key"),
            (b'{"__metadata__":{},"__metadata__":{},"a":' + ENTRY + b"}", "repeats a key"),
            (b'{"\\ud800":' + ENTRY + b"}", "holds half of a surrogate pair"),
            (b'{"__metadata__":{"k":"\\uDFFF"},"a":' + ENTRY + b"}", "holds half of a surrogate pair"),
            (b'{"a":' + ENTRY[:-1] + b',"x":["\\ud83d"]}}', "holds half of a surrogate pair"),
            (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is nested too deeply"),
            (b'{"a":' + ENTRY[:-1] + b',"x":' + b'{"y":' * 99_999 + b"1" + b"}" * 100_001, "is nested too deeply"),
            (b'{"a":' + ENTRY[:-1] + b',"x":1e400}}', "holds a number out of range"),
            (b'{"a":' + ENTRY[:-1] + b',"x":' + b"9" * 5000 + b"}}", "holds a number out of range"),
        ],
    )
    def test_text_that_is_no_header(self, refusal, text, problem):
        assert problem in refusal(raw(text, b"x")).problem

    def test_the_repeated_key_is_named(self, refusal):
        assert refusal(raw(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", b"x")).found == "'a' twice"

    def test_nesting_that_is_parsed_is_refused_where_a_size_is_due(self, refusal):
        nested = json.loads("[" * 400 + "]" * 400)
        assert refusal(raw({"a": u8(0, 1, nested)}, b"x")).tensor == "a"

    def test_an_escaped_surrogate_pair_is_a_character(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw(b'{"\\ud83d\\ude00":' + ENTRY + b"}", b"x"))
        assert read_header(path)[1][0].name == "😀"

    @pytest.mark.parametrize("metadata", [[], "text", 1, {"a": 1}, {"a": None}, {"a": ["b"]}])
    def test_metadata_that_is_no_map_of_strings(self, refusal, metadata):
        assert "__metadata__" in refusal(raw({"__metadata__": metadata, "a": u8(0, 1)}, b"x")).problem


class TestEntries:
    @pytest.mark.parametrize(
        ("entry", "problem"),
        [
            (["U8", [1], [0, 1]], "does not describe the tensor by an object"),
            (None, "does not describe the tensor by an object"),
            ({"shape": [1], "data_offsets": [0, 1]}, "no dtype"),
            ({"dtype": "U8", "data_offsets": [0, 1]}, "no shape"),
            ({"dtype": "U8", "shape": [1]}, "no data_offsets"),
            ({**u8(0, 1), "dtype": "F7"}, "unknown dtype"),
            ({**u8(0, 1), "dtype": "u8"}, "unknown dtype"),
            ({**u8(0, 1), "dtype": ["U8"]}, "unknown dtype"),
            ({**u8(0, 1), "dtype": {"U8": None}}, "unknown dtype"),
            ({**u8(0, 1), "shape": 1}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": [1.0]}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": [True]}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": [-1]}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": ["1"]}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": [10**30]}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": {"0": 1}}, "the shape is not a list of sizes"),
            ({**u8(0, 1), "shape": [2**62, 2**62]}, "the shape is larger than any array"),
            ({**u8(0, 0), "shape": [0, 2**62, 2**62]}, "the shape is larger than any array"),
            ({**u8(0, 1), "shape": [1] * 65}, "too many dimensions"),
            ({**u8(0, 1), "data_offsets": [0]}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": [0, 1, 1]}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": [-1, 0]}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": [0, 1.0]}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": [False, True]}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": "01"}, "data_offsets is not a pair"),
            ({**u8(0, 1), "data_offsets": [1, 0]}, "data_offsets are reversed"),
            ({**u8(0, 1), "shape": [2]}, "the size disagrees with shape and dtype"),
            ({**u8(0, 1), "dtype": "F32"}, "the size disagrees with shape and dtype"),
            ({**u8(0, 1), "shape": [0]}, "the size disagrees with shape and dtype"),
            ({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}, "the elements do not fill whole bytes"),
            ({"dtype": "F6_E2M3", "shape": [2], "data_offsets": [0, 1]}, "the elements do not fill whole bytes"),
        ],
    )
    def test_bad_entries(self, refusal, entry, problem):
        error = refusal(raw({"name": entry}, b"x"))
        assert problem in error.problem
        assert error.tensor == "name"
        assert error.expected is not None
        assert error.found is not None

    def test_expected_and_found_sizes(self, refusal):
        error = refusal(raw({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 10]}}, bytes(10)))
        assert error.expected == "12 bytes for BF16 [2, 3]"
        assert error.found == "10 bytes"

    def test_sub_byte_elements_that_fill_bytes(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"xyz"))
        (tensor,) = read_header(path)[1]
        assert (tensor.numel, tensor.nbytes, tensor.kind) == (4, 3, Kind.OPAQUE)

    def test_an_empty_tensor_as_wide_as_an_array_may_be(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw({"a": u8(0, 0, [0, 2**63 - 1])}))
        (tensor,) = read_header(path)[1]
        assert np.empty(tensor.shape, np.uint8).size == tensor.numel == 0

    def test_a_message_about_a_huge_shape_is_short(self, refusal):
        assert len(str(refusal(raw({"a": {**u8(0, 1), "shape": [7] * 100_000}}, b"x")))) < 2000


class TestCoverage:
    @pytest.mark.parametrize(
        ("header", "data", "problem", "tensor"),
        [
            ({"a": u8(0, 2), "b": u8(1, 3)}, b"xyz", "two tensors overlap", "b"),
            ({"a": u8(0, 2), "b": u8(0, 2)}, b"xy", "two tensors overlap", "b"),
            ({"a": u8(0, 2), "b": u8(1, 1)}, b"xy", "two tensors overlap", "b"),
            ({"a": u8(0, 1), "b": u8(2, 3)}, b"xyz", "bytes between tensors", "b"),
            ({"a": u8(1, 2)}, b"xy", "bytes between tensors", "a"),
            ({"a": u8(0, 1)}, b"xyz", "bytes after the last tensor", None),
            ({}, b"x", "bytes after the last tensor", None),
            ({"a": u8(0, 1), "b": u8(1, 9), "c": u8(9, 12)}, b"xyz", "truncated", "b"),
            ({"a": u8(0, 2**62)}, b"xyz", "truncated", "a"),
        ],
    )
    def test_bytes_that_are_not_each_in_one_tensor(self, refusal, header, data, problem, tensor):
        error = refusal(raw(header, data))
        assert problem in error.problem
        assert error.tensor == tensor

    def test_a_truncated_shard_says_both_sizes(self, tmp_path, refusal):
        whole = Path(write(tmp_path / "a.safetensors", {"a": ("F32", (100,)), "b": ("F32", (100,))})).read_bytes()
        error = refusal(whole[:-1])
        assert error.expected == f"{len(whole)} bytes"
        assert error.found == f"{len(whole) - 1} bytes"
        assert error.tensor == "b"


# Where this reader refuses what the safetensors library reads, on purpose.
STRICTER = (
    "repeats a key",
    "does not begin with '{'",
    "does not describe the tensor by an object",
    "unknown dtype",
    "the shape is larger than any array",
    "the shape is not a list of sizes",
    "too many dimensions",
)

SCALARS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([None, True, 0.0, 1.5, -0.0, 2**63, 2**64 - 1, 2**64, "", "U8", "F4"]),
)


@st.composite
def headers(draw):
    """Valid headers, then damaged: a value, a key, or a few bytes of the text."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(["U8", "BF16", "F32", "F6_E2M3", "F4", "BOOL"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3))
        size = int(np.prod(shape)) * DTYPES[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    if entries and draw(st.booleans()):
        entry = draw(st.sampled_from(entries))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        if isinstance(entry.get(key), list) and entry[key] and draw(st.booleans()):
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(SCALARS)
        elif draw(st.booleans()):
            entry.pop(key, None)
        else:
            entry[key] = draw(st.one_of(SCALARS, st.lists(SCALARS, max_size=3)))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode()
    if draw(st.booleans()):
        at, gone = draw(st.integers(0, len(text))), draw(st.integers(0, 2))
        fresh = draw(st.one_of(st.binary(max_size=2), st.sampled_from([b" ", b'"', b"\\u", b"0", b"-", b"}", b","])))
        text = text[:at] + fresh + text[at + gone :]
    data = max(0, end + draw(st.sampled_from([0, 0, 0, 0, -1, 1])))
    return raw(text, bytes(range(256))[:data] + bytes(max(0, data - 256)))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "a.safetensors"


def check_verdict(path, content):
    path.write_bytes(content)
    try:
        expected = {
            name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in deserialize(content)
        }
    except SafetensorError:
        with pytest.raises(HeaderError):
            read_header(path)
        return
    try:
        _, tensors = read_header(path)
    except HeaderError as error:
        assert any(reason in error.problem for reason in STRICTER), error
        return
    found = {tensor.name: (tensor.dtype, tensor.shape, content[tensor.start : tensor.stop]) for tensor in tensors}
    assert found == expected


@settings(max_examples=400, deadline=None)
@given(content=headers())
def test_the_verdict_on_damaged_headers_is_the_safetensors_librarys(scratch, content):
    check_verdict(scratch, content)


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(raw)))
def test_the_verdict_on_any_bytes_is_the_safetensors_librarys(scratch, content):
    check_verdict(scratch, content)


def saved_alike(folder):
    """Two files of one header and other values, as a base and its fine-tuned model are saved."""
    tensors = {"a": ("BF16", (3, 4)), "b": ("F32", ()), "none": ("I64", (0, 2)), "c": ("BF16", (3, 4))}
    paths = [write(folder / f"{name}.safetensors", tensors, {"format": "pt"}) for name in ("base", "tuned")]
    content = bytearray(Path(paths[1]).read_bytes())
    content[-2] ^= 1
    Path(paths[1]).write_bytes(content)
    return paths


class TestTheSameHeader:
    def test_what_is_known_of_it_is_what_it_says(self, tmp_path):
        base, tuned = saved_alike(tmp_path)
        shard, tensors = read_header(base)
        known = {shard.header_sha256: tensors}
        assert read_header(tuned, known=known) == read_header(tuned)
        assert {tensor.shard.path for tensor in read_header(tuned, known=known)[1]} == {tuned}
        # Of another header nothing is known.
        assert read_header(tuned, known={"0" * 64: tensors}) == read_header(tuned)

    @pytest.mark.parametrize(("size", "problem"), [(-1, "truncated"), (1, "bytes after the last tensor")])
    def test_the_file_has_to_fit_it_all_the_same(self, tmp_path, size, problem):
        base, tuned = saved_alike(tmp_path)
        shard, tensors = read_header(base)
        content = Path(tuned).read_bytes()
        Path(tuned).write_bytes(content[:-1] if size < 0 else content + b"0")
        with pytest.raises(HeaderError, match=problem):
            read_header(tuned, known={shard.header_sha256: tensors})


@pytest.mark.parametrize("shape", [[True, 4], [2.0, 2], [4, -1, -1], [-4], [2**63], ["4"], None])
def test_a_shape_is_checked_also_after_one_that_looks_the_same(refusal, shape):
    odd = {"dtype": "U8", "shape": shape, "data_offsets": [8, 12]}
    error = refusal(raw({"a": u8(0, 4, [1, 4]), "b": u8(4, 8, [2, 2]), "c": odd}, bytes(12)))
    assert (error.problem, error.tensor) == ("the shape is not a list of sizes", "c")


@pytest.mark.parametrize("offsets", [[0], [0, 4, 8], [False, 4], [0.0, 4], [-4, 0], [0, 2**63], "04", None])
def test_offsets_are_two_sizes(refusal, offsets):
    error = refusal(raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}, bytes(4)))
    assert error.problem == "data_offsets is not a pair of offsets"
