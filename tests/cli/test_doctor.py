"""`ckptdiff doctor`: what it finds, and its exit code."""

import importlib.util

import pytest

from ckptdiff.measure.cuda import choice, compiled


def test_a_machine_without_gpu_is_fine(cli, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(choice, "cupy_packages", lambda: [])
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    lines = {line[2:20].strip(): line[20:] for line in out.splitlines()}
    assert lines["self-test, cpu"] == "equal to the reference"
    assert lines["CuPy"] == "not installed"
    assert "CuPy is not installed" in lines["GPU"] and "ckptdiff[cuda13]" in lines["GPU"]
    assert "numpy" in lines["packages"]
    assert not any(line.startswith("!") for line in out.splitlines())


def test_a_wrong_answer_is_trouble(cli, monkeypatch):
    monkeypatch.setattr("ckptdiff.measure.self_test.self_test", lambda backend, names: "mask of " + "-".join(names))
    code, out, _ = cli("doctor")
    assert code == 2
    assert "! self-test, cpu    WRONG: mask of bf16-bf16-bf16" in out


def test_two_cupy_packages_are_trouble(cli, monkeypatch):
    monkeypatch.setattr("ckptdiff.measure.cuda.choice.cupy_packages", lambda: ["cupy-cuda12x 14", "cupy-cuda13x 14"])
    code, out, _ = cli("doctor")
    assert code == 2
    assert "! CuPy              cupy-cuda12x 14, cupy-cuda13x 14" in out


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is missing")
def test_kernels_are_compiled_and_kept_as_for_a_run(cli, empty_cache):
    compiled.compiled_folder.cache_clear()
    _, out, _ = cli("doctor")
    compiled.compiled_folder.cache_clear()
    lines = {line[2:20].strip(): line[20:] for line in out.splitlines()}
    assert lines["compiled for GPUs"] == str(empty_cache / "cuda")
    assert lines["kernels compile"].startswith(("yes, by NVRTC, for sm_90", "no: "))
