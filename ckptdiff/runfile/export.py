"""Write masks for other programs: one safetensors or npz file, tensor by tensor."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.globs import names_of
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.options import as_tuple
from ckptdiff.runfile.check_target import check_folder
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.safetensors_file import METADATA, Entry, is_safetensors_of, write_safetensors
from ckptdiff.runfile.schema import BIT_ORDER, escape_name, mask_chunks, packed_bytes

Layout: TypeAlias = Literal["bool", "packed", "flat", "coo"]

EXPORT_FORMAT = "ckptdiff-masks"
_SAFETENSORS_DTYPE = {"bool": "BOOL", "uint8": "U8", "int32": "I32", "int64": "I64"}


def export_masks(
    run: RunFile,
    target: str | os.PathLike[str],
    *,
    layout: Layout = "bool",
    names: Sequence[str] = (),
    listener: Listener | None = None,
) -> int:
    """Write masks of a run file to a ``.safetensors`` or ``.npz`` file.

    No more than one piece of one mask is in memory, and the target is replaced when everything is written.

    Parameters
    ----------
    run : RunFile
        Where the masks are.
    target : path-like
        What to write; its suffix says in which format. In an npz, names are escaped as in the run file.
    layout : {"bool", "packed", "flat", "coo"}
        Booleans of the tensor's shape; bits in row-major order, least significant first, as uint8 of
        (ceil(numel / 8),); row-major indices, int32 where they fit, else int64; or one row of int64 indices per axis,
        (ndim, count), as ``torch.sparse_coo_tensor`` takes them. The metadata (safetensors
        ``__metadata__``, in an npz JSON text of that name) hold format, layout, rule, compare, bit_order, and the
        shapes as JSON.
    names : sequence of str
        Tensor names or globs; none stands for all.
    listener : callable, optional
        Told of the stage "exporting".

    Returns
    -------
    int
        How many masks were written.

    Raises
    ------
    OptionError
        An unknown layout or suffix, or a name that no mask has.
    RunFileError
        The run holds no masks or is damaged; the target cannot be written, or is there and not such an export.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.exports import export_masks
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     export_masks(run, "masks.npz", layout="flat", names=["*.mlp.*"])
    12
    """
    target = Path(target)
    if layout not in get_args(Layout):
        raise OptionError("unknown layout", expected=", ".join(get_args(Layout)), found=layout)
    if target.suffix not in (".safetensors", ".npz"):
        raise OptionError("unknown export format", expected="a name in .safetensors or .npz", found=target)
    masks = [run.masks[name] for name in chosen_masks(run, names)]
    check_folder(target)
    _require_replaceable(target)
    metadata = {
        "format": EXPORT_FORMAT,
        "layout": layout,
        "rule": str(run.masks.rule),
        "compare": run.masks.compare,
        "bit_order": BIT_ORDER,
        "shapes": json.dumps({mask.name: mask.shape for mask in masks}),
    }
    write = _write_safetensors if target.suffix == ".safetensors" else _write_npz
    chunks = sum(mask_chunks(mask.numel) * _readings(mask, layout) for mask in masks)
    with stage(listener, "exporting", chunks) as told, StagedFile(target) as staged:
        write(staged, masks, layout, metadata, told)
        staged.commit()
    return len(masks)


def chosen_masks(run: RunFile, names: Sequence[str]) -> list[str]:
    """Names of the masks that names and globs ask for; all of them if there are none.

    Raises OptionError for a name that no mask has or a single string for several, and RunFileError if the run holds no
    masks.
    """
    run.require_masks()
    names = as_tuple("names", names)
    if not names:
        return list(run.masks)
    found = names_of(names, run.masks)
    for wanted, matches in found.items():
        if not matches:
            raise OptionError(
                "no mask of that name", file=run.path, found=wanted, hint=f"ckptdiff mask list {run.path} lists them"
            )
    return list(dict.fromkeys(chain.from_iterable(found.values())))


def _dtype(mask: Mask, layout: Layout) -> np.dtype[Any]:
    if layout == "flat":
        return mask.index_dtype
    if layout == "coo":
        return np.dtype(np.int64)
    return np.dtype(np.bool_ if layout == "bool" else np.uint8)


def _shape(mask: Mask, layout: Layout) -> tuple[int, ...]:
    if layout == "flat":
        return (mask.count,)
    if layout == "coo":
        return (len(mask.shape), mask.count)
    return mask.shape if layout == "bool" else (packed_bytes(mask.numel),)


def _readings(mask: Mask, layout: Layout) -> int:
    """How often a mask is read."""
    return len(mask.shape) if layout == "coo" else 1


def _pieces(mask: Mask, layout: Layout) -> Iterator[NDArray[Any]]:
    """Yield what is stored of each chunk of a mask, at each reading."""
    if layout == "flat":
        yield from mask.iter_flat()
        return
    if layout == "coo":
        # Axis by axis, as they are stored: the mask is read again for each, and never whole in memory.
        for axis in range(_readings(mask, layout)):
            yield from (np.unravel_index(piece, mask.shape)[axis] for piece in mask.iter_flat())
        return
    left = mask.numel
    for piece in mask.iter_packed():
        yield piece if layout == "packed" else np.unpackbits(piece, count=min(left, 8 * piece.size), bitorder=BIT_ORDER)
        left -= 8 * piece.size


def _little_endian(mask: Mask, layout: Layout, told: Stage) -> Iterator[bytes]:
    dtype = _dtype(mask, layout).newbyteorder("<")
    for piece in _pieces(mask, layout):
        yield piece.astype(dtype, copy=False).tobytes()
        told.more(1, mask.name)


def _write_safetensors(
    staged: StagedFile, masks: Sequence[Mask], layout: Layout, metadata: dict[str, str], told: Stage
) -> None:
    entries = [
        Entry(mask.name, dtype, _shape(mask, layout), partial(_little_endian, mask, layout, told))
        for mask in masks
        for dtype in [_SAFETENSORS_DTYPE[_dtype(mask, layout).name]]
    ]
    write_safetensors(staged, entries, metadata)


def _write_npz(
    staged: StagedFile, masks: Sequence[Mask], layout: Layout, metadata: dict[str, str], told: Stage
) -> None:
    with zipfile.ZipFile(cast(IO[bytes], staged), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        note = np.array(json.dumps(metadata))
        with archive.open(f"{METADATA}.npy", "w") as entry:
            np.lib.format.write_array(entry, note, allow_pickle=False)
        for mask in masks:
            with archive.open(f"{escape_name(mask.name)}.npy", "w", force_zip64=True) as entry:
                described = {
                    "descr": np.lib.format.dtype_to_descr(_dtype(mask, layout).newbyteorder("<")),
                    "fortran_order": False,
                    "shape": _shape(mask, layout),
                }
                np.lib.format.write_array_header_1_0(entry, described)
                for data in _little_endian(mask, layout, told):
                    entry.write(data)
                    staged.check()


def _require_replaceable(target: Path) -> None:
    if target.exists() and not (target.is_file() and _is_export(target)):
        raise RunFileError(
            "the output exists and is not an export of masks",
            file=target,
            hint="remove it, or choose another name",
        )


def _is_export(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return is_safetensors_of(path, EXPORT_FORMAT)
    with path.open("rb") as file:
        # The metadata are the first entry that ckptdiff writes.
        return file.read(256)[30:].startswith(f"{METADATA}.npy".encode())
