"""Accuracy and speed of the spectra, beside full decompositions and torch's and scikit-learn's randomized ones.

    python bench/spectra.py                              # everything; about an hour on two cores
    python bench/spectra.py --sections update,principal  # one matrix pair of 4096 x 11008
    python bench/spectra.py --quick                      # does it run at all?

Everything in a section runs in turns in one process, with the same number of threads, on the same matrices; what is
compared is checked too. `pair` and `memory` run whole commands.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import Section, Target, ckptdiff, nbytes
from make_pair import make_pair
from measure import machine, table
from spectrum_matrices import pair_of, update, write_embedding

RHO = (0.01, 0.05, 0.1, 0.2)
RANKS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("flat", "s1", "power", "exponential", "low rank", "deficient")


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes, and how often."""

    long: int
    short: int
    rounds: int
    trials: int
    trial_shape: tuple[int, int]
    pair_size: int
    embedding: tuple[int, int]
    folder: Path
    exact_rounds: int


def in_turns(rounds: int, tasks: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each task, all run once a round, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    results = {}
    for _ in range(rounds):
        for name, task in tasks.items():
            begun = time.perf_counter()
            results[name] = task()
            seconds[name].append(time.perf_counter() - begun)
            print(f"  {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def leading(delta: Any, seed: int = 0) -> Any:
    import numpy as np

    from ckptdiff.linalg.krylov import KrylovOptions, krylov_values
    from ckptdiff.linalg.passes import ArrayPanels, run_together

    options = KrylovOptions(seed=seed)
    (found,) = run_together(ArrayPanels(delta, delta), krylov_values(delta.shape[1], RANKS, np.float32, options))
    return found


def accuracy(settings: Settings) -> Section:
    """Seeded trials of each kind of spectrum against a full float64 decomposition."""
    import numpy as np

    rows, targets = [], []
    trials = held = 0
    for kind in KINDS:
        top, last, stable, bounds = [], [], [], []
        for seed in range(settings.trials):
            delta = update(kind, *settings.trial_shape, np.random.default_rng(seed))
            known = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
            found, total = leading(delta, seed), known.sum()
            sums, true_sums = np.cumsum(found.lower), np.cumsum(known)
            top.append(abs(sums[15] - true_sums[15]) / total)
            stable.append(abs(known[0] / found.lower[0] - 1) if found.lower[0] else 1.0)
            floor = 1e-12 * known[0]
            last.append(abs(np.sqrt((found.lower[63] + floor) / (known[63] + floor)) - 1))
            bounds.append((found.upper[16] - sums[15]) / total)
            trials += 1
            held += all(found.upper[k] >= true_sums[k - 1] * (1 - 1e-12) for k in RANKS)
        row = {
            "updates": kind,
            "top-16 energy, points": 100 * max(top),
            "stable rank, %": 100 * max(stable),
            "s_64, %": 100 * max(last),
            "median bound, points": 100 * statistics.median(bounds),
        }
        rows.append(row)
        targets.append(Target(f"{kind}: top-16 energy, points", row["top-16 energy, points"], "<=", 0.5))
        targets.append(Target(f"{kind}: stable rank, %", row["stable rank, %"], "<=", 0.5))
        targets.append(Target(f"{kind}: s_64, %", row["s_64, %"], "<=", 2.0 if kind == "flat" else 1.0))
        if kind == "s1":
            targets.append(Target("s1: median bound, points", row["median bound, points"], "<=", 1.0))
    targets.append(Target("trials in which the bound held", held / trials, ">=", 0.99))
    shape = " x ".join(map(str, settings.trial_shape))
    return Section(f"worst of {settings.trials} seeded trials, {shape}, against float64 svd", rows, targets)


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
        "ckptdiff": lambda: np.sqrt(leading(delta).lower),
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


def randomized_all(weights: Any, delta: Any) -> Any:
    """Every figure of randomized mode."""
    from ckptdiff.linalg.passes import ArrayPanels, run_together
    from ckptdiff.linalg.survey import survey
    from ckptdiff.options import SpectraOptions
    from ckptdiff.spectra.matrices import MatrixView
    from ckptdiff.spectra.measure import measure_randomized

    source = ArrayPanels(weights, delta)
    (known,) = run_together(source, survey())
    return measure_randomized(source, known, MatrixView(0, *weights.shape), True, SpectraOptions())


def exact_all(weights: Any, delta: Any) -> Any:
    """Every figure of exact mode."""
    from ckptdiff.linalg.passes import ArrayPanels, run_together
    from ckptdiff.linalg.survey import survey
    from ckptdiff.spectra.matrices import MatrixView
    from ckptdiff.spectra.measure import measure_exact

    source = ArrayPanels(weights, delta)
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
        {"ckptdiff, randomized": lambda: randomized_all(weights, delta), "torch svd(W0) + svdvals(d)": full},
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
    seconds, found = in_turns(settings.exact_rounds, {"ckptdiff, exact": lambda: exact_all(weights, delta), name: full})
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


def whole_pair(settings: Settings) -> Section:
    """A whole diff with randomized spectra of a Llama-shaped pair."""
    folder = settings.folder / "pair"
    make_pair(settings.pair_size, folder)
    sides = folder / "base", folder / "tuned"
    runs = [
        ckptdiff("diff", *sides, "--spectra", "randomized", "--no-progress", "--format", "json")
        for _ in range(settings.exact_rounds)
    ]
    found = json.loads(runs[-1].output)
    seconds = statistics.median(run.seconds for run in runs)
    rows = [
        {
            "what": "ckptdiff diff --spectra randomized",
            "seconds": seconds,
            "peak MB": max(run.peak_rss for run in runs) / 1e6,
        }
    ]
    matrices = found["median_2d"]["spectral"]["matrices"]
    title = f"a pair of {nbytes(sides) / 2e9:.2f} GB a side, {found['counts']['matched']} tensors, {matrices} matrices"
    return Section(title, rows, [Target("seconds", seconds, "<=", 90)])


def memory(settings: Settings) -> Section:
    """Peak memory over an embedding far larger than it."""
    rows, columns = settings.embedding
    sides = [settings.folder / f"{side}.safetensors" for side in ("base", "tuned")]
    write_embedding(sides, rows, columns)
    found = ckptdiff("diff", *sides, "--spectra", "randomized", "--no-progress", "--format", "json")
    row = {"what": f"{rows} x {columns}, bf16", "seconds": found.seconds, "peak MB": found.peak_rss / 1e6}
    method = json.loads(found.output)["tensors"][0]["spectral"]["method"]
    if method != "randomized":
        raise SystemExit(f"the embedding was not measured: {method}")
    return Section("memory", [row], [Target("peak MB", found.peak_rss / 1e6, "<=", 1000)])


SECTIONS: Mapping[str, Callable[[Settings], Section]] = {
    "accuracy": accuracy,
    "update": update_alone,
    "principal": principal,
    "exact": exact,
    "pair": whole_pair,
    "memory": memory,
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Measure the spectra beside full and randomized decompositions.")
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(SECTIONS), help=",".join(SECTIONS)
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is run (3)")
    parser.add_argument("--exact-rounds", type=int, default=1, help="how often what takes minutes is run (1)")
    parser.add_argument("--trials", type=int, default=20, help="seeded trials of each kind of spectrum (20)")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(11008, 4096), help="of the timed matrices, tall (11008 4096)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every library")
    parser.add_argument("--scratch", type=Path, help="where pairs are written")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    options = arguments(argv)
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    if any(os.environ.get(name) != count for name, count in wanted.items()):
        # They are read when NumPy and torch are loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    report: dict[str, Any] = {"machine": machine(), "threads": options.threads, "sections": {}}
    print(json.dumps(report["machine"], indent=1))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        settings = Settings(
            *((900, 700) if options.quick else options.shape),
            rounds=1 if options.quick else options.rounds,
            trials=1 if options.quick else options.trials,
            trial_shape=(800, 660) if options.quick else (1600, 800),
            pair_size=1 << 20 if options.quick else 1_164_000_000,
            embedding=(900, 700) if options.quick else (151_936, 3_584),
            folder=Path(folder),
            exact_rounds=1 if options.quick else options.exact_rounds,
        )
        for name in options.sections:
            section = SECTIONS[name](settings)
            print(table(section.title, section.rows))
            print(table("", [target.row() for target in section.targets]))
            for note in section.notes:
                print(f"  {note}")
            print(flush=True)
            report["sections"][name] = asdict(section)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
