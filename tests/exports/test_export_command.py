"""``ckptdiff mask export`` with values, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckptdiff.cli import main


def test_each_layout_says_what_it_wrote(make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, patch, adapter = str(make_run()), tmp_path / "patch.safetensors", tmp_path / "adapter"
    assert main(["mask", "export", run, "-o", str(patch), "--layout", "patch", "*.mlp.*"]) == 0
    assert "2 changed tensors written" in capsys.readouterr().err
    assert len(load_file(patch)) == 4
    assert main(["mask", "export", run, "-o", str(adapter), "--layout", "shira", "--rank", "2"]) == 0
    assert "352 coordinates of 3 layers, " in capsys.readouterr().err
    assert main(["mask", "export", run, "-o", str(tmp_path / "coo.npz"), "--layout", "coo"]) == 0
    assert "masks written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "shira"], "needs --rank"),
        (["--layout", "patch", "--rank", "3"], "--rank means nothing for --layout patch"),
        (["--tuned", "elsewhere"], "--tuned means nothing for --layout bool"),
        (["--layout", "shira", "--rank", "999"], "this rank cannot be met"),
        (["--layout", "shira", "--rank", "1", "--base", "elsewhere"], "elsewhere"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["mask", "export", str(make_run()), "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
