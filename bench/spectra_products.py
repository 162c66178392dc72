"""Speed and error of the products of spectra, beside BLAS and SciPy's sparse matrices, for `spectra.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Section, Target
from spectra_settings import Settings, in_turns, our_threads

_TIMES, _MOVED = 10, 0.1


def products(settings: Settings) -> Section:
    """A panel of a bfloat16 base, and of an update of which a tenth moved, on one thread."""
    import numpy as np
    from scipy.sparse import csr_array

    from ckptdiff.linalg.blas import add_gram_block, add_product_block
    from ckptdiff.linalg.on_numpy import NUMPY
    from ckptdiff.linalg.pair_products import multiplies_pairs

    rows, columns = (min(size, most) for size, most in ((settings.long, 1024), (settings.short, 2048)))
    rng, vectors = np.random.default_rng(0), max(columns // 5, 1)
    base = rng.standard_normal((rows, columns)).astype(np.float32)
    base.view(np.uint32)[:] &= 0xFFFF_0000
    delta = (rng.standard_normal(base.shape) * (rng.random(base.shape) < _MOVED)).astype(np.float32)
    right = rng.standard_normal((columns, vectors)).astype(np.float32)
    above = rng.standard_normal((rows, vectors)).astype(np.float32)
    listed = csr_array(delta)

    totals = {add: np.zeros((columns, columns), np.float32) for add in (NUMPY.add_gram, add_gram_block)}
    met = np.zeros((columns, vectors), np.float32)

    def gram(add: Callable[[Any, Any], None]) -> Any:
        add(totals[add], base)
        return totals[add]

    def by_blas(left: Any, other: Any) -> Any:
        out = np.empty((len(left), vectors), np.float32)
        add_product_block(out, left, other, keep=False)
        return out

    def turned() -> Any:
        NUMPY.add_product(met, delta.T, above)
        return met

    def many(task: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [task() for _ in range(_TIMES)][-1]

    tasks = {
        "W0^T W0": lambda: gram(NUMPY.add_gram),
        "W0^T W0, BLAS": lambda: gram(add_gram_block),
        "d V": lambda: NUMPY.product(delta, right),
        "d V, BLAS": lambda: by_blas(delta, right),
        "d V, SciPy sparse": lambda: listed @ right,
        "d^T A": turned,
        "d^T A, BLAS": lambda: by_blas(delta.T, above),
        "d^T A, SciPy sparse": lambda: listed.T @ above,
    }
    with our_threads(1):
        found = {name: task().copy() for name, task in tasks.items()}  # sums of others are added to from here on
        seconds, _ = in_turns(settings.rounds, {name: many(task) for name, task in tasks.items()})
    wide = {
        "W0^T W0": np.tril(base.T.astype(np.float64) @ base),
        "d V": delta.astype(np.float64) @ right,
        "d^T A": delta.T.astype(np.float64) @ above,
    }
    report, targets = [], []
    for name, each in seconds.items():
        what = name.split(",")[0]
        ours = np.tril(found[name]) if what == "W0^T W0" else found[name]
        error = float(abs(ours - wide[what]).max() / abs(wide[what]).max())
        report.append(
            {"what": name, "ms": 1e3 * each / _TIMES, "times": each / seconds[what], "error, of 1e-7": 1e7 * error}
        )
        targets.append(Target(f"error of {name}", error, "<=", 1e-5))
    for what in ("W0^T W0",) * multiplies_pairs() + ("d V", "d^T A"):
        targets.append(Target(f"{what}: BLAS / ckptdiff", seconds[f"{what}, BLAS"] / seconds[what], ">=", 1.5))
    note = (
        [] if multiplies_pairs() else ["this processor, or the kernels in use, multiply no bfloat16: W0^T W0 is BLAS's"]
    )
    return Section(f"products of a panel of {rows} x {columns}, one thread", report, targets, note)
