"""Write run files; nothing else does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5o, h5p, h5s, h5t
from numpy.typing import NDArray

import ckptdiff
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.files.staged import StagedFile
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.options import MaskRule
from ckptdiff.runfile.direct_chunks import write_chunk
from ckptdiff.runfile.histogram_table import HistogramTable
from ckptdiff.runfile.schema import BIT_ORDER, FORMAT, FORMAT_VERSION, escape_name, mask_chunk_bytes, packed_bytes
from ckptdiff.runfile.spectra_table import add_spectrum, write_spectra
from ckptdiff.runfile.tables import write_columns, write_facts, write_provenance

_PAGE = 1 << 16
_PAGES = 64
_BLANKS = 64
"""Shapes of which a blank is kept, in memory with a chunk each."""


class RunFileWriter:
    """Writes a run file beside its target and puts it in place at the end: a context manager for one thread.

    Masks and histograms come while the tensors are compared, :meth:`finish` writes the rest. Leaving the ``with``
    block without a :meth:`finish`, for whatever reason, removes what was written and leaves the target as it was.

    Parameters
    ----------
    target : Path
        Final name of the run file; :func:`~ckptdiff.runfile.check_target.check_target` has accepted it.
    rule : MaskRule
        Rule of the masks; none may be added under ``none``.
    compare : str
        "bf16" or "stored".
    title : str, optional
        The user's own title; NUL and what is not Unicode become question marks.
    paged : bool
        Write by pages of 64 KiB: quicker for tens of thousands of small masks, and a waste of room for large ones. The
        encoder of masks then takes histograms too.

    Raises
    ------
    RunFileError
        On entry, if the file cannot be made; from every method, if the disk is full or a write fails.
    """

    def __init__(
        self, target: Path, *, rule: MaskRule, compare: str, title: str | None = None, paged: bool = False
    ) -> None:
        self._staged = StagedFile(target)
        self._rule = rule
        self._root = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "ckptdiff_version": ckptdiff.__version__,
            "title": _storable(title or ""),
            "complete": 0,
        }
        self._compare = compare
        self._paging = {"fs_strategy": "page", "fs_page_size": _PAGE, "page_buf_size": _PAGES * _PAGE} if paged else {}
        self._masked: dict[str, int] = {}
        self._open: dict[str, _OpenMask] = {}
        self._blanks: dict[tuple[int, ...], _Blank] = {}
        self._file: Any = None
        self._blank_file: Any = None
        self._table: HistogramTable | None = None

    def __enter__(self) -> RunFileWriter:
        self._staged.__enter__()
        try:
            self._begin()
            return self
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def begin_mask(self, name: str, shape: tuple[int, ...]) -> None:
        """Make the dataset of a mask: for a tensor without coordinates, this is all.

        :meth:`add_mask_chunks` calls it by itself. Raises ValueError if the mask exists, or the rule is ``none``.
        """
        blank = self._blank_for(name, shape)
        link = self._place(name, blank)
        if blank.chunks:
            self._open[name] = _OpenMask(h5d.open(self._masks, link), blank.chunk, blank.chunks)
        self._staged.check()

    def add_mask_chunks(
        self, name: str, shape: tuple[int, ...], first: int, chunks: Sequence[tuple[bytes, int]]
    ) -> None:
        """Add consecutive chunks of a mask, each as :func:`~ckptdiff.runfile.compress.compress_chunk` returned it.

        They start at coordinate ``first << 20``. They may come in any order; raises ValueError if there is no such
        chunk, or one was added before.
        """
        if name not in self._open:
            blank = self._blank_for(name, shape)
            if self._paging and (blank.chunks, first, len(chunks)) == (1, 0, 1):
                # Copied along, the chunk costs a sixth of what it takes to open the copy and write there.
                write_chunk(blank.dataset, (0,), *chunks[0])
                self._place(name, blank)
                self._staged.check()
                return
            self.begin_mask(name, shape)
        mask = self._open[name]
        for index, (payload, filter_mask) in enumerate(chunks, first):
            mask.take(index)
            write_chunk(mask.dataset, (index * mask.chunk,), payload, filter_mask)
        if not mask.missing:
            del self._open[name]
        self._staged.check()

    def add_histograms(self, rows: HistogramRows) -> None:
        """Add the histograms of the next tensors in plan order."""
        assert self._table is not None
        self._table.add(rows)
        self._staged.check()

    def add_facts(self, tensors: Sequence[TensorFacts]) -> None:
        """Write what is known of all tensors before their figures, while those are measured; else :meth:`finish` does.

        Of each, ``kept`` may still be unknown.
        """
        write_facts(self._file.create_group("tensors"), tensors)
        self._staged.check()

    def add_spectrum(self, name: str, method: str, lists: Mapping[str, NDArray[np.float64]]) -> None:
        """Add the singular values of one tensor; see :func:`~ckptdiff.runfile.spectra_table.add_spectrum`."""
        add_spectrum(self._file, name, method, lists)
        self._staged.check()

    def finish(self, diff: Diff) -> None:
        """Write everything else and put the run file in place.

        The mappings of the result hold plain JSON values: dict, list, str, int, float, bool, None. Raises ValueError if
        masks or histograms do not cover its tensors.
        """
        self._require_masks(diff)
        assert self._table is not None
        self._table.finish(len(diff.tensors))
        if "tensors" not in self._file:
            self.add_facts(diff.tensors)
        write_columns(self._file["tensors"], diff)
        self._table.name_rows(self._file["tensors/name"])
        if diff.spectra is not None:
            write_spectra(self._file, diff.spectra)
        write_provenance(self._file, diff)
        self._blanks.clear()
        # Complete is set after everything else is in the file, should anyone open the temporary one.
        self._file.flush()
        self._file.attrs["complete"] = 1
        self._file.close()
        self._staged.commit()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._close()
        finally:
            self._staged.__exit__(kind, error, trace)

    def _begin(self) -> None:
        # The layout of HDF5 1.10 (2016) finds a chunk without a B-tree of two kilobytes for each mask.
        cache = {"rdcc_nslots": 1, "rdcc_nbytes": 0}
        layout = {"libver": ("v110", "v110"), "track_order": False, **cache}
        self._file = h5py.File(self._staged, "w", **layout, **self._paging)
        # What blanks leave free as one chunk takes the place of another would be searched for room for every mask.
        memory = {"driver": "core", "backing_store": False, "block_size": _PAGE}
        self._blank_file = h5py.File(f"blanks of {id(self)}", "w", **layout, **memory)
        self._file.attrs.update(self._root)
        masks = self._file.create_group("masks")
        masks.attrs.update(rule=str(self._rule), compare=self._compare, bit_order=BIT_ORDER)
        self._masks = masks.id
        self._table = HistogramTable(self._file.create_group("histograms"), many=bool(self._paging))

    def _blank_for(self, name: str, shape: tuple[int, ...]) -> _Blank:
        """What a new mask begins as."""
        if name in self._masked or self._rule.kind == "none":
            raise ValueError(f"no mask expected for {name!r} under {self._rule}")
        if shape not in self._blanks:
            if len(self._blanks) == _BLANKS:
                self._blanks.clear()
            self._blanks[shape] = _blank(self._blank_file.id, shape)
        return self._blanks[shape]

    def _place(self, name: str, blank: _Blank) -> bytes:
        """Make a mask of a blank as it is; returns its link."""
        link = escape_name(name).encode()
        # A copy costs half of a new dataset with its attribute, and the high-level calls several times as much: seconds
        # over 30,000 tensors.
        h5o.copy(blank.dataset, b".", self._masks, link)
        self._masked[name] = blank.numel
        return link

    def _close(self) -> None:
        # What HDF5 still writes as it closes a file that is thrown away must not need room.
        self._staged.stop()
        if self._table is not None:
            self._table.close()
        self._open.clear()
        self._blanks.clear()
        for file in filter(None, (self._blank_file, self._file)):
            # What HDF5 says of a file that is thrown away must not hide why it is thrown away.
            with suppress(OSError, RuntimeError, SystemError):
                file.close()

    def _require_masks(self, diff: Diff) -> None:
        if self._open:
            raise ValueError(f"chunks are missing in the masks of {', '.join(self._open)}")
        wanted: Mapping[str, int] = {}
        if self._rule.kind != "none":
            wanted = {tensor.name: math.prod(tensor.shape) for tensor in diff.tensors}
        if wanted != self._masked:
            names = [name for name in {*wanted, *self._masked} if wanted.get(name) != self._masked.get(name)]
            raise ValueError(f"masks that are not those of the compared tensors: {', '.join(sorted(names))}")


def _storable(text: str) -> str:
    # HDF5 strings hold neither NUL nor what a command line that is not UTF-8 turns into.
    return text.replace("\0", "?").encode(errors="replace").decode()


class _Blank(NamedTuple):
    """A mask of one shape, of which all of that shape begin as copies, empty or with the one chunk it was given."""

    numel: int
    chunk: int
    chunks: int
    dataset: Any
    """Without a name, so that it goes when it is closed."""


def _blank(file: Any, shape: tuple[int, ...]) -> _Blank:
    numel = math.prod(shape)
    size, chunk = packed_bytes(numel), mask_chunk_bytes(numel)
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    if size:
        creation.set_chunk((chunk,))
        creation.set_deflate(1)
    dataset = h5d.create(file, None, h5t.STD_U8LE, h5s.create_simple((size,)), creation)
    attribute = h5a.create(dataset, b"shape", h5t.STD_I64LE, h5s.create_simple((len(shape),)))
    if shape:
        attribute.write(np.array(shape, np.int64), h5t.NATIVE_INT64)
    return _Blank(numel, chunk, -(-size // chunk) if size else 0, dataset)


class _OpenMask:
    """A mask of which chunks are missing."""

    __slots__ = ("_written", "chunk", "dataset", "missing")

    def __init__(self, dataset: Any, chunk: int, chunks: int) -> None:
        self.dataset = dataset
        self.chunk = chunk
        self.missing = chunks
        self._written = bytearray(chunks)

    def take(self, index: int) -> None:
        if not 0 <= index < len(self._written) or self._written[index]:
            raise ValueError(f"chunk {index} of {len(self._written)} is out of range or was added before")
        self._written[index] = 1
        self.missing -= 1
