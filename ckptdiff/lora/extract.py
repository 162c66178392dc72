"""Make an adapter of two checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ckptdiff.checkpoint import Kind, TensorPair, open_checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.weights import CommonPart
from ckptdiff.errors import OptionError, PairingError
from ckptdiff.events import Listener, Note, ignore, stage
from ckptdiff.exports.adaptable import Adapted
from ckptdiff.files.staged import StagedFile, StagedFolder
from ckptdiff.linalg.blas import require_scipy
from ckptdiff.lora.adapter import AdapterWriter, stacked
from ckptdiff.lora.factoring import Factoring, Update
from ckptdiff.lora.factors import Factors, krylov_block
from ckptdiff.memory import resident
from ckptdiff.options import MaskRule, Options, SpectraOptions
from ckptdiff.remote.address import is_url, shown
from ckptdiff.report.text import percent
from ckptdiff.run.engine import run_plan
from ckptdiff.run.planning import prepare
from ckptdiff.run.warm_up import Uses, load, panel_uses
from ckptdiff.runfile.check_target import check_new
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.spectra_gpu import open_spectra_gpu


@dataclass(frozen=True, slots=True)
class Extracted:
    """The update of one tensor, in an adapter or left out of it.

    Attributes
    ----------
    name : str
    shape : tuple of int
    delta_norm : float
        Frobenius norm of its update.
    rank : int
        Of its factors; 0 if the adapter leaves it out.
    lost : float
        Share of its energy, sum d^2, that the adapter does not hold.
    reason : str, optional
        Why it is left out.
    """

    name: str
    shape: tuple[int, ...]
    delta_norm: float
    rank: int
    lost: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Extraction:
    """An adapter that was written.

    Attributes
    ----------
    folder : Path
    tensors : tuple of Extracted
        Every tensor with an update.
    unchanged : int
        Tensors without one.
    """

    folder: Path
    tensors: tuple[Extracted, ...]
    unchanged: int

    @property
    def lost(self) -> float:
        """Share of the energy of the whole update that the adapter does not hold."""
        total = sum(tensor.delta_norm**2 for tensor in self.tensors)
        return sum(tensor.lost * tensor.delta_norm**2 for tensor in self.tensors) / total if total else 0.0


def extract_lora(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rank: int,
    energy: float | None = None,
    seed: int = 0,
    options: Options | None = None,
    listener: Listener | None = None,
) -> Extraction:
    """Write the update between two checkpoints as a PEFT adapter.

    Values are compared as they are stored, in float32 where the dtypes differ.

    Parameters
    ----------
    base, tuned : path-like
        The checkpoints.
    folder : path-like
        To be made.
    rank : int
        Of the factors, 1 to 4096; the largest one if `energy` is given.
    energy : float, optional
        Share of each tensor's energy to keep, above 0 and at most 1.
    seed : int
        Of the randomized SVD.
    options : Options, optional
        Which tensors, and how they are paired and read.
    listener : callable, optional
        Called with every event of the comparison, of the stages "factors" and "writing", and with a `Note` for each
        tensor that changed.

    Returns
    -------
    Extraction

    Raises
    ------
    OptionError
        If `rank` or `energy` is out of range, or SciPy is missing.
    CheckpointError
        If a checkpoint cannot be read, or changes while it is read.
    PairingError
        If nothing changed that an adapter can hold.
    RunFileError
        If the folder exists or cannot be written.

    Examples
    --------
    >>> from ckptdiff.lora import extract_lora
    >>> made = extract_lora("fixtures/llama/base", "fixtures/llama/tuned", "adapter", rank=4)
    >>> [(tensor.shape, tensor.rank) for tensor in made.tensors if "layers.0.mlp.up" in tensor.name]
    [((128, 64), 4)]
    """
    if not 1 <= rank <= 4096:
        raise OptionError("rank out of range", expected="1 to 4096", found=rank)
    if energy is not None and not 0 < energy <= 1:
        raise OptionError("energy out of range", expected="above 0, at most 1", found=energy)
    base, tuned, folder = os.fspath(base), os.fspath(tuned), Path(folder)
    require_scipy()
    options = replace(options or Options(), compare="stored", mask=MaskRule("none"), spectra=None)
    check_new(folder)
    tell = listener or ignore
    plan = prepare(base, tuned, options=options, tell=tell)
    gpu = open_spectra_gpu(options, "randomized", tell)
    diff = run_plan(plan, listener=tell)
    load(None, Uses(tuple(panel_uses(plan.pairs, options.compare))), tell)
    strange = diff.columns["nonfinite_base"] + diff.columns["nonfinite_tuned"] > 0
    shapes = {pair.name: pair.shape for pair in plan.pairs}
    model = Adapted.of(str(diff.base["shards"][0]["file"]), shapes.items())
    updates = [
        _update(pair, norm, model, bool(strange[row]))
        for row, (pair, norm) in enumerate(zip(plan.pairs, diff.columns["delta_norm"].tolist(), strict=True))
        if norm > 0
    ]
    if model.merged:  # PEFT asks for all experts of a layer, those too that are not compared
        shapes = {name: tensor.shape for name, tensor in open_checkpoint(base, options.stream).tensors.items()} | shapes
    names = {model.called(name): shape for name, shape in shapes.items()}
    experts = {name.removesuffix(".weight"): shape for name, shape in names.items() if model.is_merged(name)}
    found: list[Extracted] = []
    with StagedFolder(folder) as made:
        with open_shards(plan.io) as shards, StagedFile(made.path / "factors") as spool:
            writer = AdapterWriter(made.path, shown(base) if is_url(base) else base, spool)
            asked = replace(options, spectra=SpectraOptions(block=min(krylov_block(rank), 1024)))
            views = (update.views[0] for update in updates if update.reason is None)
            budget = gpu.budget(asked) if gpu else Budget.of(asked, resident(), views)
            factoring = Factoring(shards, options.compare, budget, gpu, rank, energy, seed)
            for update, factors in factoring.factors(updates, tell):
                found.append(_written(writer, update, factors, model) if factors else _left_out(update))
                made_of = f"rank {found[-1].rank}, {percent(found[-1].lost)} lost"
                tell(Note(f"{update.pair.name}: {made_of if factors else f'left out: {update.reason}'}"))
            if not any(tensor.rank for tensor in found):
                raise PairingError(
                    "no update that an adapter of linear layers could hold",
                    file=str(diff.tuned["path"]),
                    expected="matrices that changed",
                    found=f"{len(found)} other tensors that changed" if found else "no tensor that changed",
                )
            with stage(tell, "writing", spool.tell(), "bytes") as told:
                writer.finish(experts, told)
        made.commit()
    return Extraction(folder, tuple(found), len(plan.pairs) - len(found))


def _update(pair: TensorPair, norm: float, model: Adapted, strange: bool) -> Update:
    called = model.called(pair.name)
    way, reason = model.way(called, pair.shape, pair.base.kind is Kind.FLOAT, "lora")
    if pair.untied:
        reason = "tied to the embedding on one side"
    elif pair.rows is not None:
        reason = "of other rows on the other side"
    elif isinstance(pair.base, CommonPart):
        reason = "the tuned side lacks a part of it"
    elif strange:
        reason = "NaN or Inf in it"
    return Update(pair, called, norm, None if reason else way, reason or None)


def _left_out(update: Update) -> Extracted:
    return Extracted(update.pair.name, update.pair.shape, update.norm, 0, 1.0, update.reason)


def _written(writer: AdapterWriter, update: Update, found: list[Factors | None], model: Adapted) -> Extracted:
    name, way = update.called, update.way
    assert way is not None
    parts = [None if factors is None else factors.of(view) for factors, view in zip(found, update.views, strict=True)]
    if way == "stack":
        view = update.views[0]
        rank, down, up = stacked(parts, view.rows, view.columns, model.stacks_in_out)
    else:
        (part,) = parts
        assert part is not None
        down, up = part if way != "conv1d" else (part[1].T, part[0].T)
        rank = len(down)
    writer.add(name if way in ("parameter", "stack") else name.removesuffix(".weight"), way, rank, down, up)
    lost = sum(factors.lost * factors.norm**2 for factors in found if factors is not None) / update.norm**2
    return Extracted(update.pair.name, update.pair.shape, update.norm, rank, lost)
