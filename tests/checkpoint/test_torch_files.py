"""Files of torch.save are read where they lie: every value is what torch.load gives, and what is wrong is named."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from fake_ranks import part_of, save_by_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_safetensors import write_index
from safetensors.torch import save_file
from stored_values import assert_holds, assert_parts, read
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.boxes import is_contiguous
from ckptdiff.checkpoint.torch_file import _mesh_shape
from ckptdiff.checkpoint.unpickle import Made
from ckptdiff.errors import CheckpointError, HeaderError

WHOLE = torch.arange(60, dtype=torch.float32).reshape(10, 6)
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def saved(tmp_path, state, name="model.pt", **options):
    torch.save(state, tmp_path / name, **options)
    return tmp_path / name


class TestTensors:
    @pytest.mark.parametrize("io", ["pread", "mmap"])
    def test_every_dtype(self, tmp_path, io):
        bits = torch.arange(1, 49, dtype=torch.uint8)
        state = {str(dtype): bits.clone().view(dtype) if dtype is not torch.bool else bits % 2 == 0 for dtype in DTYPES}
        path = saved(tmp_path, state)
        assert_holds(path, torch.load(path, weights_only=True), io)
        found = open_checkpoint(path).tensors
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            str(one): name for one, name in DTYPES.items()
        }

    @pytest.mark.parametrize("io", ["pread", "mmap"])
    def test_however_they_lie_in_their_storage(self, tmp_path, io):
        conv = torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last)
        state = {
            "parameter": torch.nn.Parameter(WHOLE.clone()),
            "buffer": torch.nn.Buffer(WHOLE.bfloat16()),
            "transposed": WHOLE.t(),
            "view": WHOLE[2:5, 1:4],
            "stepped": WHOLE[::3, 1::2],
            "line": WHOLE.reshape(-1)[3::7],
            "column": WHOLE[:, 2],
            "channels_last": conv,
            "permuted": torch.randn(4, 3, 5, 2).permute(3, 1, 0, 2),
            "experts": torch.randn(3, 4, 5).transpose(1, 2),
            "scalar": torch.tensor(2.5),
            "of_one": torch.tensor([1.0]).expand(1, 1, 1),
            "position_ids": torch.arange(7).expand((1, -1)),
            "expanded": torch.arange(3.0)[:, None].expand(4, 3, 5),
            "windows": torch.arange(9.0).unfold(0, 4, 2),
            "empty": torch.zeros(0, 4),
            "empty_view": WHOLE[3:3],
            "named: \x00/ü": WHOLE.half(),
        }
        path = saved(tmp_path, state)
        assert_holds(path, state, io)
        assert_holds(path, torch.load(path, weights_only=True), io)

    @pytest.mark.filterwarnings("ignore")
    @given(data=st.data())
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_any_strides(self, tmp_path, data):
        sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        steps = [data.draw(st.integers(1, 3)) for _ in sizes]
        starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
        order = data.draw(st.permutations(range(len(sizes))))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
        whole = (torch.arange(np.prod(sizes)) % 250).to(dtype).reshape(sizes)
        view = whole[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))].permute(order)
        path = saved(tmp_path, {"w": view})
        assert_holds(path, {"w": view})
        first = data.draw(st.integers(0, view.numel() - 1))
        stop = data.draw(st.integers(first + 1, view.numel()))
        height, width = view.numel() // view.shape[-1], view.shape[-1]
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        box = (top, data.draw(st.integers(top + 1, height))), (left, data.draw(st.integers(left + 1, width)))
        assert_parts(path, "w", {"w": view}, [(first, stop)], [box])

    def test_far_strides_are_read_element_by_element(self, tmp_path):
        whole = torch.arange(300 * 40, dtype=torch.float32).reshape(300, 40)
        state = {"column": whole[:, 3], "turned": whole.reshape(3, 100, 40).permute(1, 2, 0)}
        assert_holds(saved(tmp_path, state), state)

    def test_one_storage_for_several_names(self, tmp_path):
        state = {"embed.weight": WHOLE, "head.weight": WHOLE, "rows": WHOLE[:4], "norm": torch.ones(3)}
        path = saved(tmp_path, state)
        assert_holds(path, state)
        found = open_checkpoint(path).tensors
        assert found["embed.weight"].region == found["head.weight"].region != found["rows"].region
        assert found["rows"].start == found["embed.weight"].start

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_protocol(self, tmp_path, protocol):
        state = collections.OrderedDict(a=WHOLE, b=torch.ones(2, dtype=torch.uint16))
        assert_holds(saved(tmp_path, state, pickle_protocol=protocol), state)

    def test_whole_modules_state(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
            memory_format=torch.channels_last
        )
        assert_holds(saved(tmp_path, model.state_dict()), model.state_dict())

    @pytest.mark.parametrize(
        ("tensor", "problem", "found"),
        [
            (torch.zeros(2, dtype=torch.complex128), "a dtype that is not read", "torch.ComplexDoubleStorage"),
            (torch.zeros(2, device="meta"), "the tensor has no values", "torch._utils._rebuild_meta_tensor_no_storage"),
        ],
    )
    def test_what_is_not_stored_plainly(self, tmp_path, tensor, problem, found):
        error = refusal(saved(tmp_path, {"good": WHOLE, "odd": tensor}))
        assert error.problem.startswith(problem)
        assert (error.file, error.tensor, error.found) == (str(tmp_path / "model.pt"), "odd", found)

    @pytest.mark.parametrize(
        ("odd", "named"),
        [
            (torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
            (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
            (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
            (np.float64(1.5), "scalar"),
        ],
    )
    def test_other_classes(self, tmp_path, odd, named):
        error = refusal(saved(tmp_path, {"good": WHOLE, "odd": odd}))
        assert "asks for a class" in error.problem
        assert named in error.found


class TestFiles:
    def test_a_trainers_checkpoint(self, tmp_path):
        model = torch.nn.Linear(6, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        model(WHOLE).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng_state": torch.get_rng_state()}
        path = saved(tmp_path, {**state, "ema": {"weight": WHOLE}, "step": 1, "lr": 0.1})
        assert_holds(path, model.state_dict())
        (warning,) = open_checkpoint(path).warnings
        assert "its part 'model' is read, and not 'optimizer' (6 tensors), 'rng_state' (1 tensor), 'ema'" in warning
        assert_holds(f"{path}#ema", {"weight": WHOLE})
        assert refusal(f"{path}#teacher").problem == "there is no such part"
        saved(tmp_path, {"own": WHOLE}, "model.pt#ema")
        assert_holds(f"{path}#ema", {"own": WHOLE})

    def test_an_index_and_its_shards(self, tmp_path):
        first, second = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
        saved(tmp_path, {"a": WHOLE}, first)
        saved(tmp_path, {"b": WHOLE.t()}, second)
        saved(tmp_path, {"x": WHOLE}, "training_args.bin")
        assert_holds(tmp_path, {"a": WHOLE, "b": WHOLE.t()})
        write_index(tmp_path / "pytorch_model.bin.index.json", {"a": first, "b": second})
        for path in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
            assert_holds(path, {"a": WHOLE, "b": WHOLE.t()})
            assert open_checkpoint(path).warnings == ()
        saved(tmp_path, {"c": WHOLE}, "extra.bin")
        assert "extra.bin: not read" in open_checkpoint(tmp_path).warnings[0]
        (tmp_path / second).unlink()
        assert "missing" in refusal(tmp_path).problem
        (tmp_path / "pytorch_model.bin.index.json").unlink()
        assert refusal(tmp_path).found == f"1; missing: {second}"

    def test_safetensors_come_first(self, tmp_path):
        saved(tmp_path, {"pickled": WHOLE}, "pytorch_model.bin")
        save_file({"a": WHOLE}, tmp_path / "model.safetensors")
        assert_holds(tmp_path, {"a": WHOLE})
        error = refusal(f"{tmp_path / 'model.safetensors'}#ema")
        assert error.problem == "a safetensors file has no parts"

    def test_two_files_with_one_tensor(self, tmp_path):
        for name in ("best.pt", "last.pt"):
            saved(tmp_path, {"a": WHOLE}, name)
        assert refusal(tmp_path).problem == "two files of the checkpoint store the same tensor"
        assert_holds(tmp_path / "last.pt", {"a": WHOLE})

    def test_the_old_format_is_refused_with_the_line_that_converts_it(self, tmp_path):
        error = refusal(saved(tmp_path, {"a": WHOLE}, _use_new_zipfile_serialization=False))
        assert (error.problem, error.found) == ("not a safetensors file", "a pickle")
        assert "weights_only=True" in error.hint

    def test_the_digest_tells_values_apart(self, tmp_path):
        digests = []
        for scale in (1, 2, 1):
            (shard,) = open_checkpoint(saved(tmp_path, {"a": scale * WHOLE})).shards
            digests.append(shard.header_sha256)
        assert digests[0] == digests[2] != digests[1]


def rewrite(path, change, **options):
    """Write an archive anew, each record as `change` makes it: None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            made = change(name, content)
            if made is not None:
                archive.writestr(name, made)
    return path


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        return saved(tmp_path, {"a": WHOLE, "b": torch.ones(5)})

    def test_an_archive_by_another_writer(self, path):
        assert_holds(rewrite(path, lambda name, content: content), {"a": WHOLE, "b": torch.ones(5)})

    def test_zip64_records(self, path):
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                with archive.open(name, "w", force_zip64=True) as record:
                    record.write(content)
        assert_holds(path, {"a": WHOLE, "b": torch.ones(5)})

    def test_compressed_records(self, path):
        error = refusal(rewrite(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED))
        assert error.problem == "a record of the archive is compressed"
        assert "data.pkl" in error.found

    def test_a_file_cut_short(self, path):
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 40, 4):
            path.write_bytes(content[:length])
            error = refusal(path)
            assert error.problem == "the file is truncated, or no zip archive"
            assert error.file == str(path)

    def test_a_storage_that_is_missing_or_too_short(self, path):
        rewrite(path, lambda name, content: None if name.endswith("data/0") else content)
        error = refusal(path)
        assert (error.problem, error.tensor) == ("the file does not hold the tensor's storage", "a")
        assert (error.expected, error.found) == ("a record data/0 of 240 bytes", "none")
        rewrite(path, lambda name, content: content[:-4] if name.endswith("data/1") else content)
        assert refusal(path).problem == "the file does not hold the tensor's storage"

    def test_another_byte_order(self, path):
        rewrite(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
        error = refusal(path)
        assert "low byte first" in error.problem
        assert error.found == "'big'"
        rewrite(path, lambda name, content: None if name.endswith("byteorder") else content)
        assert_holds(path, {"a": WHOLE, "b": torch.ones(5)})

    def test_records_that_overlap(self, path):
        """The directory's last two records are given one place."""
        content = bytearray(path.read_bytes())
        entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
        content[entries[1] + 42 : entries[1] + 46] = content[entries[0] + 42 : entries[0] + 46]
        path.write_bytes(content)
        assert refusal(path).problem == "two records of the archive overlap, or are one"

    def test_a_record_that_is_longer_than_it_may_be(self, path):
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02")
        content[at + 20 : at + 28] = struct.pack("<II", 1000, 1000)
        path.write_bytes(content)
        assert "overlap" in refusal(path).problem

    def test_a_record_that_is_not_where_the_directory_says(self, path):
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x03\x04", 1)] = 0
        path.write_bytes(content)
        assert refusal(path).problem == "a record of the archive does not lie where its directory says"

    def test_bytes_before_the_archive(self, tmp_path, path):
        other = tmp_path / "other.pt"
        other.write_bytes(path.read_bytes() + path.read_bytes())
        assert refusal(other).problem == "there are bytes before the archive"

    def test_other_archives(self, tmp_path):
        content = io.BytesIO()
        np.savez(content, a=np.ones(3))
        (tmp_path / "a.pt").write_bytes(content.getvalue())
        assert refusal(tmp_path / "a.pt").problem == "a zip archive that torch.save did not write"
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "b.pt")
        assert refusal(tmp_path / "b.pt").problem == "a record of the archive is compressed"
        saved(tmp_path, WHOLE, "c.pt")
        assert refusal(tmp_path / "c.pt").found == "a tensor without a name"

    @pytest.mark.parametrize(
        ("sizes", "problem"),
        [
            ((11, 6), "the tensor lies beyond its storage"),
            ((10, -6), "the pickle does not describe the tensor as torch does"),
            ((2**62, 2**62), "the tensor lies beyond its storage"),
            ((10, "6"), "the pickle does not describe the tensor as torch does"),
            ((10,), "the pickle does not describe the tensor as torch does"),
        ],
    )
    def test_a_tensor_beyond_its_storage(self, tmp_path, sizes, problem):
        path = saved(tmp_path, {"a": WHOLE})

        class Storage:
            pass

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                return ("storage", torch.FloatStorage, "0", "cpu", 60) if isinstance(value, Storage) else None

        class Tensor:
            def __reduce__(self):
                return torch._utils._rebuild_tensor_v2, (Storage(), 0, sizes, (6, 1), False, collections.OrderedDict())

        content = io.BytesIO()
        Pickler(content, 2).dump({"a": Tensor()})
        rewrite(path, lambda name, record: content.getvalue() if name.endswith("data.pkl") else record)
        error = refusal(path)
        assert error.problem == problem
        assert (error.file, error.tensor) == (str(path), "a")


MESHES = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 2), [Shard(1), Replicate()]),
    ((3, 4), [Shard(1), Shard(0)]),
]


class TestRanks:
    """Files of FSDP's trainers: DTensors, by ranks that a fake process group lets one process be."""

    @pytest.mark.parametrize(("shape", "placements"), MESHES)
    def test_slices_are_put_together(self, tmp_path, shape, placements):
        wholes = {"w": WHOLE, "half": WHOLE.bfloat16(), "short": WHOLE[:3], "experts": torch.randn(5, 3, 2)}

        def make(mesh):
            parts = {name: part_of(whole, mesh, placements) for name, whole in wholes.items()}
            return {**parts, "scale": torch.tensor(3.0), "plain": WHOLE}

        save_by_ranks(tmp_path / "ranks", shape, make)
        save_by_ranks(tmp_path / "ranks", shape, lambda mesh: {"state": {}}, "optim")
        wholes |= {"scale": torch.tensor(3.0), "plain": WHOLE}
        assert_holds(tmp_path / "ranks", wholes)
        assert_holds(sorted((tmp_path / "ranks").iterdir())[0], wholes)
        every = [(first, first + 7) for first in range(0, 53, 5)]
        assert_parts(tmp_path / "ranks", "w", wholes, every, [((2, 9), (1, 4)), ((0, 10), (5, 6))])

    def test_strided_shards(self, tmp_path):
        """FSDP over tensor parallelism: each rank's rows are a part of a part, cut in the other order."""

        def make(mesh):
            tensor_parallel = torch.chunk(WHOLE, 2, 0)[mesh.get_local_rank(1)]
            local = torch.chunk(tensor_parallel, 2, 0)[mesh.get_local_rank(0)]
            part = part_of(WHOLE, mesh, [Shard(0), Shard(0)])
            part._spec.placements = (_StridedShard(0, split_factor=2), Shard(0))
            part._local_tensor = local.clone()
            return {"w": part}

        assert_holds(save_by_ranks(tmp_path / "ranks", (2, 2), make), {"w": WHOLE})

    def test_rows_of_long_tensors_are_runs(self, tmp_path):
        whole = torch.randn(64, 512)
        folder = save_by_ranks(tmp_path / "ranks", (4,), lambda mesh: {"w": part_of(whole, mesh, [Shard(0)])})
        (tensor,) = open_checkpoint(folder).tensors.values()
        assert len(tensor.slices) == 4
        assert is_contiguous(tensor)
        assert_holds(folder, {"w": whole}, "mmap")

    def test_a_rank_that_is_missing(self, tmp_path):
        folder = save_by_ranks(tmp_path / "ranks", (4,), lambda mesh: {"w": part_of(WHOLE, mesh, [Shard(0)])})
        (folder / "model_world_size_4_rank_2.pt").rename(tmp_path / "alone.pt")
        error = refusal(folder)
        assert error.problem == "files of ranks are missing"
        assert error.found == "3; missing: model_world_size_4_rank_2.pt"
        error = refusal(tmp_path / "alone.pt")
        assert (error.problem, error.tensor) == ("slices of the tensor are missing", "w")
        assert error.found == "18 elements in 1 slices"

    def test_ranks_that_do_not_fit_together(self, tmp_path):
        one = save_by_ranks(tmp_path / "one", (2,), lambda mesh: {"w": part_of(WHOLE, mesh, [Shard(0)])})
        other = save_by_ranks(tmp_path / "other", (2,), lambda mesh: {"w": part_of(WHOLE[:8], mesh, [Shard(0)])})
        third = save_by_ranks(tmp_path / "third", (2,), lambda mesh: {"w": part_of(WHOLE, mesh, [Shard(1)])})
        name = "model_world_size_2_rank_1.pt"
        content = (one / name).read_bytes()
        (one / name).write_bytes((other / name).read_bytes())
        assert refusal(one).problem == "the files of two ranks disagree about the tensor"
        (one / name).write_bytes((third / name).read_bytes())
        error = refusal(one)
        assert (error.problem, error.tensor) == ("two slices of the tensor overlap", "w")
        assert "[0:5, 0:6]" in error.found
        (one / name).write_bytes(content)
        assert read(one)["w"][0] == (10, 6)


def test_sharded_tensors(tmp_path):
    """What FSDP's first version leaves in a rank's file."""
    from fake_ranks import as_rank
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import ShardedTensor
    from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

    for rank in range(2):
        with as_rank(rank, (2,)):
            local = LocalShard.from_tensor_and_offsets(WHOLE[5 * rank : 5 * rank + 5].clone(), [5 * rank, 0], rank)
            every = [ShardMetadata([5 * one, 0], [5, 6], f"rank:{one}/cpu") for one in range(2)]
            known = ShardedTensorMetadata(every, WHOLE.shape, TensorProperties(dtype=torch.float32))
            whole = ShardedTensor._init_from_local_shards_and_global_metadata([local], known)
            saved(tmp_path, {"w": whole, "norm": torch.ones(3)}, f"pytorch_model_fsdp_world_size_2_rank_{rank}.pt")
    assert_holds(tmp_path, {"w": WHOLE, "norm": torch.ones(3)})


def test_partial_sums_are_refused(tmp_path):
    from torch.distributed.tensor import Partial

    folder = save_by_ranks(tmp_path / "ranks", (2,), lambda mesh: {"w": part_of(WHOLE, mesh, [Partial()])})
    with pytest.raises(HeaderError, match="a sum over ranks"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ({"mesh": ("_rebuild_tensor_v2", (None, 0, (2, 4), (4, 1)), None)}, (2, 4)),
        ({"_layout": ("_MeshLayout", (), {"shape": 8, "stride": 1})}, (8,)),
        ({"_layout": ("_MeshLayout", (), {"shape": (2, 4), "stride": (4, 1)})}, (2, 4)),
        ({"_layout": ("_MeshLayout", (), {"shape": (2, (2, 2)), "stride": (4, (2, 1))})}, (2, 4)),
    ],
)
def test_meshes_as_versions_before_kept_them(mesh, shape):
    made = {}
    for name, (of, args, state) in mesh.items():
        made[name] = Made(of, args)
        made[name].state = state
    assert _mesh_shape(made) == shape
