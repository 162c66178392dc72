"""Measure the spectra of the matrices of a checkpoint pair: streamed from the shards, after the coordinate pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptdiff.spectra.existing import add_spectra

__all__ = ["add_spectra"]


def __getattr__(name: str) -> Any:
    if name == "add_spectra":  # it reads run files, which the engine has no use for
        from ckptdiff.spectra.existing import add_spectra

        return add_spectra
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
