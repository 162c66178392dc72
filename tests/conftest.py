"""Shared fixtures: synthetic Diffs, made without an engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before NumPy and torch are loaded: on a busy machine two threads of theirs spend seconds waiting for each other over
# tiny matrices. Tests that are about several set them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from synthetic_diffs import build_diff, llama_facts, tensor_facts

from ckptdiff.figures.result import Diff, TensorFacts, UnmatchedTensor

# How long an example takes depends on the machine, and on whether a kernel has to be compiled first.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Shells start what runs in the background with Ctrl-C ignored, and nohup ignores SIGHUP: the commands that are tested
# would inherit it.
for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, usual)

NEEDED = ("gpu", "nvrtc")
"""Markers of tests that CKPTDIFF_NEED_GPU=1 does not let be skipped."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CKPTDIFF_NEED_GPU=1 a test that is skipped for want of a GPU, or of what compiles for one, has failed."""
    report = yield
    needed = os.environ.get("CKPTDIFF_NEED_GPU") == "1" and any(item.get_closest_marker(name) for name in NEEDED)
    if report.skipped and needed:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CKPTDIFF_NEED_GPU=1, but: {reason}"
    return report


MakeDiff = Callable[..., Diff]


@pytest.fixture(scope="session")
def make_diff() -> MakeDiff:
    """``make_diff(layers=2, tensors=None, **changes)``: a Diff of a small Llama, or of (facts, unchanged) pairs."""

    def make(layers: int = 2, tensors: Sequence[tuple[TensorFacts, float]] | None = None, **changes: Any) -> Diff:
        return build_diff(llama_facts(layers) if tensors is None else tensors, **changes)

    return make


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., TensorFacts]:
    """``make_facts(name, shape, **changes)``: facts of one bf16 tensor, its place read from the name."""
    return tensor_facts


@pytest.fixture(scope="session")
def diff(make_diff: MakeDiff) -> Diff:
    return make_diff()


@pytest.fixture(scope="session")
def troubled_diff(make_diff: MakeDiff) -> Diff:
    """A Diff with everything that can be special about tensors."""
    tensors = [
        (tensor_facts("model.layers.0.mlp.up_proj.weight", (64, 32), dtype_base="F32", dtype_tuned="F32"), 0.7),
        (
            tensor_facts(
                "model.visual.blocks.0.attn.qkv.weight", (64, 32), tuned_name="visual.blocks.0.attn.qkv.weight"
            ),
            0.9,
        ),
        (tensor_facts("evil\x1b[31m\n\u202ename[red]", (8, 4), same_bytes=True), 1.0),
        (tensor_facts("empty", (0, 4)), 1.0),
        (tensor_facts("scalar", ()), 0.0),
        (tensor_facts("position_ids", (1, 16), dtype_base="I64", dtype_tuned="I64", compare="bitwise"), 0.5),
    ]
    return make_diff(
        tensors=tensors,
        only_in_base=("embeddings.position_ids", "a", "b", "c\x1b[2J"),
        only_in_tuned=("extra",),
        aliased=(("lm_head.weight", "model.embed_tokens.weight"),),
        mismatched=(
            UnmatchedTensor(
                "vocab",
                {"dtype": "BF16", "shape": [8, 2]},
                {"dtype": "BF16", "shape": [9, 2]},
                "shapes differ: [8, 2] in base, [9, 2] in tuned",
            ),
        ),
        warnings=("fp8 tensors are compared as raw codes",),
    )


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that CKPTDIFF_CACHE_DIR names, in which no kernel was kept yet; processes use none that was built."""
    from ckptdiff import kernel_cache, kernel_library

    kernel_library.library()  # which this process keeps, whatever the variables say later
    folder = tmp_path / "cache"
    monkeypatch.setenv("CKPTDIFF_CACHE_DIR", str(folder))
    monkeypatch.setenv("CKPTDIFF_KERNELS", "jit")
    kernel_cache.cache_folder.cache_clear()
    yield folder
    kernel_cache.cache_folder.cache_clear()
