from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.linalg import on_numpy, pair_products
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.pair_products import add_pair_gram, multiplies_pairs
from ckptdiff.linalg.threads import product_threads


def narrow(rows: int, columns: int, seed: int) -> np.ndarray:
    """Values that bfloat16 has."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values.view(np.uint32)[:] &= 0xFFFF_0000
    return values


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 1023, 1025, 2050])),
    columns=st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 257])),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_a_gram_matrix_is_numpys(rows: int, columns: int, threads: int, seed: int) -> None:
    panel = narrow(rows, columns, seed)
    total = np.ones((columns, columns), np.float32)
    with product_threads(threads):
        assert add_pair_gram(total, panel)
    wide = panel.astype(np.float64)
    most = 40 * float(np.finfo(np.float32).eps) * (1 + abs(wide).T @ abs(wide))
    assert np.all(np.tril(abs(total - (1 + wide.T @ wide))) <= most)
    assert np.array_equal(np.triu(total, 1), np.triu(np.ones_like(total), 1))


def test_whole_numbers_leave_no_product_out() -> None:
    """Sums of theirs are exact in any order."""
    panel = np.random.default_rng(0).integers(-3, 4, (1100, 190)).astype(np.float32)
    total = np.zeros((190, 190), np.float32)
    assert add_pair_gram(total, panel)
    assert np.array_equal(total, np.tril(panel.T @ panel))


@pytest.mark.parametrize("place", [(0, 0), (6, 3), (8, 69)], ids=str)
def test_a_value_that_bfloat16_lacks_leaves_it_to_others(place: tuple[int, int]) -> None:
    panel, total = narrow(9, 70, 1), np.zeros((70, 70), np.float32)
    panel[place] += np.float32(2.0**-12) * panel[place]
    assert not add_pair_gram(total, panel)
    assert not total.any()
    NUMPY.add_gram(total, panel)
    assert np.allclose(np.tril(total), np.tril(panel.T @ panel), rtol=1e-5)


@pytest.mark.parametrize("has", [True, False])
def test_it_is_used_where_the_processor_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(on_numpy, "multiplies_pairs", lambda: has)
    monkeypatch.setattr(on_numpy, "add_pair_gram", lambda *given: taken.append(given) or add_pair_gram(*given))
    for dtype in (np.float32, np.float64):
        panel = narrow(300, 200, 2).astype(dtype)
        total = np.zeros((200, 200), dtype)
        NUMPY.add_gram(total, panel)
        assert np.allclose(np.tril(total), np.tril(panel.T @ panel), rtol=1e-4, atol=1e-4)
    assert len(taken) == has


@pytest.mark.parametrize("kernels", ["compiled on the spot", "x86_64-v4", "x86_64-v3", "aarch64-baseline"])
@pytest.mark.parametrize("flag", ["avx512_bf16", "avx512f"])
def test_what_tells_that_it_has(kernels: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_products, "processor_flags", lambda: frozenset([flag]))
    monkeypatch.setattr(pair_products, "kernels_in_use", lambda: kernels)
    multiplies_pairs.cache_clear()
    try:
        known = flag == "avx512_bf16" and kernels in ("compiled on the spot", "x86_64-v4")
        assert multiplies_pairs() == known
    finally:
        multiplies_pairs.cache_clear()
