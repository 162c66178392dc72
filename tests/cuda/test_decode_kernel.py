"""Codes with scales on a device: values are those of the processor's decoder, and so is what sides have in common."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from code_samples import assert_partials_equal
from host_gpu import HostGpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantised import LAYOUTS, Sample, save
from safetensors.torch import save_file

from ckptdiff.checkpoint import TensorPair, open_checkpoint
from ckptdiff.checkpoint.boxes import boxes_of_elements, read_elements
from ckptdiff.checkpoint.decoding import Decoder
from ckptdiff.checkpoint.encodings import find_encoded
from ckptdiff.checkpoint.kept import Kept, count_kept
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.weights import Assembled, Decoded, Piece
from ckptdiff.errors import CheckpointError
from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.coded_side import size_of
from ckptdiff.measure.cuda.layout import RECORD
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.partial import Partial, Rule, Scan
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.self_test import decoding_test, wrong_figures
from ckptdiff.run.coded_pair import CodedPair, goes_as_codes
from ckptdiff.run.shard_source import ShardSource, SideRooms
from ckptdiff.run.tasks import Span

PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}


def any_bits(sample: Sample, rng: np.random.Generator) -> Sample:
    """The same with every code there is, and scales that are zero, negative, infinite and NaN among them."""
    sample.tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in sample.tensors.items()
    }
    for name, tensor in sample.tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8)
        if "shape" in name or "zero_point" in name:
            continue
        if "scale" not in name or tensor.element_size() == 1:
            raw[:] = torch.from_numpy(rng.integers(0, 256, raw.numel(), dtype=np.uint8))
        elif tensor.numel() > 4:
            odd = torch.tensor([0.0, -1.0, torch.inf, -torch.nan, 1e-40])
            tensor.view(-1)[torch.from_numpy(rng.permutation(tensor.numel())[:5])] = odd[: tensor.numel()]
    return sample


def encoded(folder: Path, sample: Sample) -> Decoded:
    (weight,) = find_encoded(open_checkpoint(save(folder, sample.tensors, sample.config))).weights.values()
    return weight


def stored(path: Path, values: np.ndarray, format: str):
    save_file({"a.weight": torch.from_numpy(values).to(PLAIN[format])}, path)
    return open_checkpoint(path).tensors["a.weight"]


def on_device(library, shards, sides, first, stop, seed=0, blocks=3):
    """Values of both sides, what was counted of them, and how many bytes went up of each side."""
    pair = CodedPair(shards, *sides, 0, [Decoder(), Decoder()], counts=True)
    numel = stop - first
    up = [np.full(max(pair.most_bytes(numel), 4 * numel), 0xAA, np.uint8) for _ in range(2)]
    formats = [side.dtype.lower() for side in sides]
    given = [
        room if coded else room[: numel * FORMATS[name].bits // 8]
        for room, coded, name in zip(up, pair.sides, formats, strict=True)
    ]
    pair.read(first, stop, *given)
    values = [np.full(numel + 1, 7, np.float32) for _ in range(2)]
    record = np.zeros(1, RECORD)
    rooms = [[value] if coded else None for value, coded in zip(values, pair.sides, strict=True)]
    library.launch("decode", blocks, [*([room] for room in up), *rooms, np.uint32(1), [record]], seed)
    assert all(value[-1] == 7 for value in values)
    pair.found(*record[0]["kept"].tolist())
    sizes = [size_of(room) for room, coded in zip(up, pair.sides, strict=True) if coded]
    assert all(size <= pair.most_bytes(numel) for size in sizes)
    return [value[:numel] if coded else None for value, coded in zip(values, pair.sides, strict=True)], pair.kept


def by_processor(shards, sides, first, stop, as_bf16):
    """The same by the decoder of the processor."""
    decoders, kept, values = [Decoder(), Decoder()], [], []
    for side in sides:
        out = np.empty((stop - first) * FORMATS[side.dtype.lower()].bits // 8, np.uint8)
        read_elements(shards, side, first, stop, out, Decoder())
        values.append(out)
    floats = [
        value.view(np.float32) if side.dtype == "F32" else torch.from_numpy(value).view(PLAIN[side.dtype.lower()])
        for value, side in zip(values, sides, strict=True)
    ]
    done = 0
    for rows, columns in boxes_of_elements(sides[0].shape, first, stop):
        shape = rows[1] - rows[0], columns[1] - columns[0]
        found = []
        for side, value, decoder in zip(sides, floats, decoders, strict=True):
            part = value[done : done + shape[0] * shape[1]]
            if isinstance(side, Decoded):
                found.append(decoder.decode(shards, side, rows, columns, np.empty(shape, np.float32), detail=True))
            else:
                part = part if side.dtype == "F32" else part.float().numpy()
                found.append(np.ascontiguousarray(part).reshape(shape))
        kept.append(count_kept(*found, as_bf16=as_bf16))
        done += shape[0] * shape[1]
    return values, sum(kept[1:], kept[0])


def agree(library, shards, sides, first, stop, as_bf16, **how):
    got, kept = on_device(library, shards, sides, first, stop, **how)
    expected, right = by_processor(shards, sides, first, stop, as_bf16)
    for ours, theirs in zip(got, expected, strict=True):
        if ours is not None:
            np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert kept == right
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_layout_is_decoded_as_by_the_processor(layout, libraries, tmp_path, data):
    """Any codes and scales, any span of a weight, against another one of its layout."""
    m, n, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 140)), data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    samples = [any_bits(LAYOUTS[layout](rng, m, n), rng) for _ in range(2)]
    if data.draw(st.booleans()):  # most of it the same
        for name, tensor in samples[1].tensors.items():
            theirs, ours = (each.reshape(-1).view(torch.uint8) for each in (tensor, samples[0].tensors[name]))
            theirs[:] = torch.where(torch.from_numpy(rng.random(theirs.shape) < 0.9), ours, theirs)
    sides = [encoded(tmp_path / str(number), sample) for number, sample in enumerate(samples)]
    first, stop = sorted(data.draw(st.lists(st.integers(0, sides[0].numel), min_size=2, max_size=2, unique=True)))
    names = data.draw(st.sampled_from([("f32", "f32", "bf16"), ("f32", "f32", "f32")]))
    with open_shards(data.draw(st.sampled_from(["pread", "mmap"]))) as shards:
        how = {"seed": seed, "blocks": data.draw(st.integers(1, 4))}
        agree(libraries(*names), shards, sides, first, stop, names[2] == "bf16", **how)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("compare", ["bf16", "f32"])
def test_every_code_against_every_other(dtype, compare, libraries, tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.from_numpy(np.exp2(np.random.default_rng(0).uniform(-145, 20, (256, 1))).astype(np.float32))
    scales[:4, 0] = torch.tensor([0, torch.inf, torch.nan, -1])
    sides = []
    for number, side in enumerate((codes, codes.T)):
        tensors = {"a.weight": side.contiguous().view(dtype), "a.weight_scale": scales}
        sides.append(encoded(tmp_path / str(number), Sample(tensors, np.empty(0), "FP8")))
    with open_shards("pread") as shards:
        kept = agree(libraries("f32", "f32", compare), shards, sides, 0, 1 << 16, compare == "bf16")
    assert kept.equal_codes == 256 + 2 and 0 < kept.within < kept.changed  # both zeros


@pytest.mark.parametrize("format", PLAIN)
@pytest.mark.parametrize("layout", ["DeepSeek fp8", "NVFP4 of compressed-tensors", "3 bits in words, zero points"])
@pytest.mark.parametrize("coded_first", [True, False])
def test_a_plain_side_beside_a_coded_one(format, layout, coded_first, libraries, tmp_path):
    rng = np.random.default_rng(5)
    sample = LAYOUTS[layout](rng, 300, 210)
    weight = encoded(tmp_path / "coded", sample)
    noise = rng.normal(1, 0.5, weight.shape).astype(np.float32)
    other = stored(tmp_path / "plain.safetensors", sample.expected.reshape(weight.shape) * noise, format)
    sides = [weight, other] if coded_first else [other, weight]
    names = [side.dtype.lower() for side in sides]
    with open_shards("pread") as shards:
        kept = agree(libraries(*names, "bf16"), shards, sides, 77, weight.numel - 5, True)
    assert kept.equal_codes is None and kept.scales is None and 0 < kept.within < kept.changed < kept.values


@pytest.mark.parametrize("layout", ["DeepSeek fp8", "NVFP4 of ModelOpt"])
def test_different_grids_and_codes_have_nothing_in_common(layout, libraries, tmp_path):
    rng = np.random.default_rng(1)
    one = encoded(tmp_path / "one", LAYOUTS[layout](rng, 64, 256))
    other = encoded(tmp_path / "other", LAYOUTS["compressed-tensors fp8, blocks"](rng, 64, 256))
    with open_shards("pread") as shards:
        kept = agree(libraries("f32", "f32", "f32"), shards, [one, other], 3, 9999, False)
    assert kept.scales is None and (kept.equal_codes is None) == (one.code != other.code)


def test_codes_of_signed_bytes_and_of_words_are_the_same(libraries, tmp_path):
    """Bits of one are turned over to be those of the other."""
    rng = np.random.default_rng(1)
    words = LAYOUTS["8 bits in words"](rng, 20, 64)
    fields = words.tensors["a.weight_packed"].view(torch.uint8)
    scales = words.tensors["a.weight_scale"]
    config = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8}
    groups = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [], "weights": config}}}
    signed = {"a.weight": (fields ^ 0x80).view(torch.int8), "a.weight_scale": scales}
    sides = (
        encoded(tmp_path / "words", words),
        encoded(tmp_path / "bytes", replace(words, tensors=signed, config=groups)),
    )
    with open_shards("pread") as shards:
        kept = agree(libraries("f32", "f32", "f32"), shards, sides, 0, 20 * 64, False)
    assert kept == Kept(1280, 1280, 160, 160, 0, 0)


def spans_on(tmp_path, kind):
    """Both sides of a weight that takes several launches, and its formats."""
    rng = np.random.default_rng(3)
    if kind == "fp8 beside bf16":
        sample = LAYOUTS["DeepSeek fp8"](rng, 700, 390)
        plain = stored(tmp_path / "plain.safetensors", sample.expected, "bf16")
        return [plain, encoded(tmp_path / "coded", sample)], ("bf16", "f32", "bf16")
    layouts = {"NVFP4 of both libraries": ("NVFP4 of compressed-tensors", "NVFP4 of ModelOpt")}
    made = layouts.get(kind, (kind, kind))
    return [encoded(tmp_path / str(at), LAYOUTS[name](rng, 410, 700)) for at, name in enumerate(made)], (
        "f32",
        "f32",
        "f32",
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["fp8 beside bf16", "NVFP4 of both libraries", "4 bits in words, zero points"])
def test_any_schedule_decodes_launch_after_launch(libraries, tmp_path, seed, kind):
    sides, names = spans_on(tmp_path, kind)
    pair = TensorPair("a.weight", *sides)
    assert goes_as_codes(*sides)
    room = Room(8 << 15, 2)
    worker = CudaBackend(HostGpu(libraries, seed, processors=1), room)
    base, tuned, compare = (FORMATS[name] for name in names)
    scan = Scan(base, tuned, compare, (0.0, 1e-8, 1e-5), 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    with open_shards("pread") as shards:
        found = []
        for backend, decodes in ((worker, True), (ReferenceBackend(), False)):
            source = ShardSource(shards, pair, Span(0, 0, 1), SideRooms(), threading.Event(), compare.name, decodes)
            partial = Partial()
            found.append((backend.scan(scan, source, partial), partial, source.kept))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert_partials_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] and found[0][2].values == sides[0].numel > 2 * room.coordinates(32)


def test_odd_scales_are_told(libraries, tmp_path):
    rng = np.random.default_rng(3)
    sample = LAYOUTS["DeepSeek fp8"](rng, 300, 300)
    sample.tensors["a.weight_scale_inv"][1, 1] = 0
    sample.tensors["a.weight_scale_inv"][2, 2] = np.nan
    weight, decoder = encoded(tmp_path / "odd", sample), Decoder()
    with open_shards("pread") as shards:
        pair = CodedPair(shards, weight, weight, 0, [decoder, Decoder()], counts=False)
        rooms = [np.empty(pair.most_bytes(90_000), np.uint8) for _ in range(2)]
        pair.read(0, 90_000, *rooms)
    assert Counter(what for _, _, what, _ in decoder.odd) == {"zero": 1, "NaN": 1}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_launch_takes_more_than_was_said(tmp_path, data):
    """However long rows are, and wherever a span begins."""
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    m, n = data.draw(st.sampled_from([(1, 900), (3, 300), (30, 30), (300, 3), (900, 1)]))
    weight = encoded(tmp_path / layout, LAYOUTS[layout](np.random.default_rng(0), m, n))
    first, stop = sorted(data.draw(st.lists(st.integers(0, weight.numel), min_size=2, max_size=2, unique=True)))
    with open_shards("pread") as shards:
        pair = CodedPair(shards, weight, weight, 0, [Decoder(), Decoder()], counts=False)
        room = np.empty(pair.most_bytes(weight.numel) + 1000, np.uint8)
        pair.read(first, stop, room, room.copy())
    assert size_of(room) <= pair.most_bytes(stop - first)


def test_what_takes_more_than_its_values_stays_with_the_processor(tmp_path):
    """Rows of one column: a word for each, and a scale. And what is put together of pieces, even of one run."""
    rng = np.random.default_rng(0)
    narrow = encoded(tmp_path / "narrow", LAYOUTS["3 bits in words, zero points for rows"](rng, 40_000, 1))
    wide = encoded(tmp_path / "wide", LAYOUTS["3 bits in words, zero points for rows"](rng, 10, 100))
    plain = stored(tmp_path / "plain.safetensors", np.zeros((10, 100), np.float32), "f32")
    assert [goes_as_codes(side, side) for side in (narrow, wide, plain)] == [False, True, False]
    assert goes_as_codes(plain, wide) and goes_as_codes(wide, plain)
    whole = tuple((0, size, 1) for size in wide.shape)
    pieces = Assembled("a.weight", "F32", wide.shape, (Piece(plain, whole, whole),))
    assert not goes_as_codes(wide, pieces)


def test_a_device_that_decodes_wrongly_is_not_accepted(libraries):
    assert decoding_test(CudaBackend(HostGpu(libraries, processors=1), Room.smallest())) is None

    class Mistaken(HostGpu):
        """Writes the values of the base into the room of both sides."""

        def launch(self, formats, kernel, blocks, args, stream):
            if kernel == "decode" and args[2] is not None:
                args = [args[0], args[0], args[2], args[3], *args[4:]]
            super().launch(formats, kernel, blocks, args, stream)

    wrong = wrong_figures(CudaBackend(Mistaken(libraries, processors=1), Room.smallest()))
    assert wrong.endswith("of e4m3 and integers") and "codes have in common" in wrong


@pytest.mark.parametrize(("names", "what"), [(("f32",) * 3, "e4m3"), (("bf16", "f32", "bf16"), "e5m2")])
def test_a_device_that_flushes_to_zero_does_not_decode_right(libraries, names, what):
    worker = CudaBackend(HostGpu(libraries, processors=1), Room.smallest())
    with libraries(*names).flushing():
        wrong = decoding_test(worker)
    assert wrong is not None and what in wrong and "deltas" in wrong


def test_codes_that_cannot_be_read_leave_nothing_under_way(libraries, tmp_path):
    sample = LAYOUTS["DeepSeek fp8"](np.random.default_rng(3), 700, 390)
    weight, path = encoded(tmp_path, sample), tmp_path / "model.safetensors"
    gpu = HostGpu(libraries, processors=1)
    worker = CudaBackend(gpu, Room(8 << 15, 2))
    f32 = FORMATS["f32"]
    with pytest.raises(CheckpointError, match="changed while it was read") as caught, open_shards("pread") as shards:
        assert shards[weight.codes.shard]  # as it was
        path.write_bytes(path.read_bytes()[:-30_000])
        whole, stop = Span(0, 0, 1), threading.Event()
        source = ShardSource(shards, TensorPair("a.weight", weight, weight), whole, SideRooms(), stop, None, True)
        worker.scan(Scan(f32, f32, f32), source, Partial())
    assert caught.value.file == str(path) and gpu.queued == 0
    assert any(entry.name == "carry_out" for entry in caught.traceback)
