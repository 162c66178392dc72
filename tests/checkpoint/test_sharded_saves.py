"""What real ranks save, FSDP2 over tensor parallelism, is read as the tensors that were cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import on_ranks
from safetensors.torch import load_file
from stored_values import assert_holds

from ckptdiff.checkpoint import open_checkpoint


@pytest.mark.slow
def test_ranks_of_a_trainer(tmp_path: Path) -> None:
    on_ranks(4, "sharded_saves:save_everything", tmp_path)
    whole = load_file(tmp_path / "whole.safetensors")
    for folder in ("ranks", "nested", "flat"):
        assert_holds(tmp_path / folder, whole)
        said = open_checkpoint(tmp_path / folder).warnings
        assert bool(said) == (folder != "ranks")
        assert all("not 'optimizer'" in warning for warning in said)
