"""Retraining is there only where torch is, and takes no longer to import than torch does."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_torch_the_message_says_what_to_install() -> None:
    found = python("import sys; sys.modules['torch'] = None; from ckptdiff.retrain import load_masks")
    assert found.returncode == 1
    assert "pip install 'ckptdiff[retrain]'" in found.stderr


@pytest.mark.slow
def test_transformers_is_imported_for_the_callback_only() -> None:
    found = python(
        "import sys, ckptdiff.retrain as r; assert 'transformers' not in sys.modules; r.MaskCallback;"
        " assert 'transformers' in sys.modules; print(hasattr(r, 'nothing'))"
    )
    assert (found.returncode, found.stdout) == (0, "False\n"), found.stderr
