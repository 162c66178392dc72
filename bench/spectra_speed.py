"""Speed of each mode on one matrix pair, beside full and randomized decompositions, for `spectra.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Section, Target
from spectra_settings import Settings, in_turns, leading, our_threads
from spectrum_matrices import pair_of


def update_alone(settings: Settings) -> Section:
    """The update's own figures, beside all singular values and other randomized methods at equal error."""
    import numpy as np
    import torch

    delta = pair_of(settings.long, settings.short)[1]
    tensor = torch.from_numpy(delta)
    known = np.sqrt(np.maximum(np.linalg.eigvalsh(delta.T.astype(np.float64) @ delta)[::-1][:64], 0.0))
    # More iterations until s_64 is as near as ours.
    error = abs(np.sqrt(leading(delta).lower[63]) / known[63] - 1)
    wanted = max(error, 1e-4)
    niter = next((n for n in range(2, 40) if _error(torch.svd_lowrank(tensor, q=128, niter=n)[1], known) <= wanted), 40)
    tasks: dict[str, Callable[[], Any]] = {
        "ckptdiff": lambda: np.sqrt(leading(delta, 0, settings.threads).lower),
        f"torch.svd_lowrank(q=128, niter={niter})": lambda: torch.svd_lowrank(tensor, q=128, niter=niter)[1].numpy(),
        "torch.linalg.svdvals, float32": lambda: torch.linalg.svdvals(tensor).numpy(),
    }
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        note = ["scikit-learn is not installed: its randomized_svd was not measured"]
    else:
        note = []
        tasks[f"sklearn randomized_svd(128, n_iter={niter})"] = lambda: randomized_svd(
            delta, 128, n_oversamples=0, n_iter=niter, random_state=0
        )[1]
    seconds, found = in_turns(settings.rounds, tasks)
    ours, *others = seconds
    rows = [
        {
            "what": name,
            "seconds": seconds[name],
            "times": seconds[name] / seconds[ours],
            "s_64 error, %": 100 * abs(found[name][63] / known[63] - 1),
        }
        for name in seconds
    ]
    full = "torch.linalg.svdvals, float32"
    targets = [Target(f"{full} / ckptdiff", seconds[full] / seconds[ours], ">=", 8)]
    targets += [Target(f"{name} / ckptdiff", seconds[name] / seconds[ours], ">=", 1) for name in others if name != full]
    return Section(f"the update's figures, {settings.long} x {settings.short}", rows, targets, note)


def _error(values: Any, known: Any) -> float:
    return abs(float(values[63]) / float(known[63]) - 1)


def randomized_all(weights: Any, delta: Any, threads: int) -> Any:
    """Every figure of randomized mode."""
    from ckptdiff.linalg.stages import ArrayPanels, run_together
    from ckptdiff.linalg.survey import survey
    from ckptdiff.options import SpectraOptions
    from ckptdiff.spectra.matrices import MatrixView
    from ckptdiff.spectra.measure import measure_randomized

    source = ArrayPanels(weights, delta)
    with our_threads(threads):
        (known,) = run_together(source, survey())
        return measure_randomized(source, known, MatrixView(0, *weights.shape), True, SpectraOptions())


def exact_all(weights: Any, delta: Any, threads: int) -> Any:
    """Every figure of exact mode."""
    from ckptdiff.linalg.stages import ArrayPanels, run_together
    from ckptdiff.linalg.survey import survey
    from ckptdiff.spectra.matrices import MatrixView
    from ckptdiff.spectra.measure import measure_exact

    source = ArrayPanels(weights, delta)
    with our_threads(threads):
        (known,) = run_together(source, survey())
        return measure_exact(source, known, MatrixView(0, *weights.shape), True, together=True)


def principal(settings: Settings) -> Section:
    """All figures of randomized mode, beside the two decompositions they stand for."""
    import numpy as np
    import torch

    weights, delta = pair_of(settings.long, settings.short)
    tensors = torch.from_numpy(weights), torch.from_numpy(delta)

    def full() -> Any:
        return torch.linalg.svd(tensors[0], full_matrices=False), torch.linalg.svdvals(tensors[1])

    seconds, found = in_turns(
        settings.rounds,
        {
            "ckptdiff, randomized": lambda: randomized_all(weights, delta, settings.threads),
            "torch svd(W0) + svdvals(d)": full,
        },
    )
    (left, _, right), values = found["torch svd(W0) + svdvals(d)"]
    k = int(0.1 * settings.short)
    kept = left[:, :k].T.double() @ tensors[1].double() @ right[:k].T.double()
    figures = found["ckptdiff, randomized"].figures
    known = float((kept**2).sum()) / float((delta.astype(np.float64) ** 2).sum())
    theirs = float((values[:16].double() ** 2).sum() / (values.double() ** 2).sum())
    rows = [
        {"what": name, "seconds": each, "times": each / seconds["ckptdiff, randomized"]}
        for name, each in seconds.items()
    ]
    targets = [
        Target("torch / ckptdiff", seconds["torch svd(W0) + svdvals(d)"] / seconds["ckptdiff, randomized"], ">=", 3.5),
        Target("principal energy, relative difference", abs(figures["principal_energy_0.1"] / known - 1), "<=", 1e-4),
        Target("top-16 energy, difference", abs(figures["topk_energy_16"] - theirs), "<=", 0.005),
    ]
    note = ["torch works in float32 too, so the difference in principal energy holds its error"]
    return Section(f"all figures, randomized, {settings.long} x {settings.short}", rows, targets, note)


def exact(settings: Settings) -> Section:
    """All figures of exact mode, beside full float64 decompositions of W0, W1 and d."""
    import numpy as np
    import torch

    weights, delta = (side.astype(np.float64) for side in pair_of(settings.long, settings.short))
    tensors = [torch.from_numpy(side) for side in (weights, weights + delta, delta)]

    def full() -> Any:
        return [torch.linalg.svd(side, full_matrices=False) for side in tensors]

    name = "torch svd of W0, W1, d in float64"
    seconds, found = in_turns(
        settings.exact_rounds, {"ckptdiff, exact": lambda: exact_all(weights, delta, settings.threads), name: full}
    )
    ours = found["ckptdiff, exact"]
    base, tuned, moved = (side[1].numpy() for side in found[name])
    k = int(0.1 * settings.short)
    left, right = found[name][0][0][:, :k], found[name][0][2][:k]
    known = float(((left.T @ tensors[2] @ right.T) ** 2).sum() / (tensors[2] ** 2).sum())
    differences = [
        np.abs(ours.values[key] - side).max() / side[0]
        for key, side in (("base", base), ("tuned", tuned), ("delta", moved))
    ]
    nss = float(np.linalg.norm(tuned - base) / np.linalg.norm(base))
    rows = [
        {"what": label, "seconds": each, "times": each / seconds["ckptdiff, exact"]} for label, each in seconds.items()
    ]
    targets = [
        Target("torch / ckptdiff", seconds[name] / seconds["ckptdiff, exact"], ">=", 2),
        Target("singular values, in units of s_1", float(max(differences)), "<=", 1e-11),
        Target("NSS, relative difference", abs(ours.figures["nss"] / nss - 1), "<=", 1e-8),
        Target(
            "principal energy, relative difference", abs(ours.figures["principal_energy_0.1"] / known - 1), "<=", 1e-8
        ),
        Target(
            "rank at 1e-5, difference",
            abs(ours.figures["numerical_rank_1e-05"] - int((moved > 1e-5 * moved[0]).sum())),
            "<=",
            0,
        ),
    ]
    return Section(f"all figures, exact, {settings.long} x {settings.short}", rows, targets)
