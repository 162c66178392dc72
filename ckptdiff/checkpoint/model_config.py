"""Read the ``config.json`` beside a checkpoint, as far as a comparison asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.regular_file import read_whole
from ckptdiff.checkpoint.tied_models import TIED_BY_DEFAULT
from ckptdiff.errors import CheckpointError
from ckptdiff.remote.address import Address, is_url

__all__ = ["Config", "config_beside", "read_config", "says_tied"]

_MAX_BYTES = 10_000_000


class Config(NamedTuple):
    """A file of configuration beside a checkpoint."""

    path: str
    values: dict[str, Any]
    """Its object; empty where there is no such file, or none that can be used."""
    warning: str | None
    """Why it cannot be used."""


def says_tied(checkpoint: Checkpoint) -> tuple[bool, str | None]:
    """Whether the model's output head is its token embedding, by its own word.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its ``config.json`` is the one in the folder of its index, or of its first file.

    Returns
    -------
    bool
        ``tie_word_embeddings`` is true, at the top or in ``text_config``; without that key, ``model_type`` is one of
        those that tie them by default. False where there is no such file.
    str or None
        A warning, if there is a file that cannot be used.
    """
    config = read_config(checkpoint)
    parts = [part for part in (config.values, config.values.get("text_config")) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return True in said if said else any(
        str(part.get("model_type")) in TIED_BY_DEFAULT for part in parts
    ), config.warning


def read_config(checkpoint: Checkpoint, name: str = "config.json") -> Config:
    """Read a file of configuration: once, as long as it stays the same.

    Parameters
    ----------
    checkpoint : Checkpoint
    name : str
        Of a file in the folder of its index, or of its first file.
    """
    if not checkpoint.shards:
        return Config(name, {}, None)
    remote = checkpoint.shards[0].remote
    if remote is not None:
        return _fetch(remote.address.beside(name))
    return config_beside(checkpoint.shards[0].path if checkpoint.index is None else checkpoint.index.path, name)


def config_beside(file: str, name: str = "config.json") -> Config:
    """Read a file of configuration in the folder of another file: once, as long as it stays the same."""
    if is_url(file):
        from ckptdiff.checkpoint.find_remote import address_of

        return _fetch(address_of(file).beside(name))
    path = str(Path(file).parent / name)
    try:
        status = Path(path).stat()
    except OSError:
        return _read(path, None)
    return _read(path, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=8)
def _read(path: str, status: tuple[int, ...] | None) -> Config:
    return _parse(path, lambda: read_whole(path, _MAX_BYTES))


@lru_cache(maxsize=8)
def _fetch(address: Address) -> Config:
    from ckptdiff.remote.transport import fetch_whole

    return _parse(address.shown, lambda: fetch_whole(address, _MAX_BYTES))


def _parse(path: str, read: Callable[[], bytes]) -> Config:
    try:
        # Not the strict reader: transformers writes Infinity.
        values = json.loads(read())
    except CheckpointError as error:
        absent = isinstance(error.__cause__, FileNotFoundError)
        return Config(path, {}, None if absent else f"{path} is not used: {error.problem}")
    except (ValueError, RecursionError):
        return Config(path, {}, f"{path} is not used: it is not valid JSON")
    if not isinstance(values, dict):
        return Config(path, {}, f"{path} is not used: it is not a JSON object")
    return Config(path, values, None)
