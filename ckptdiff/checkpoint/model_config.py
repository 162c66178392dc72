"""Read the ``config.json`` beside a checkpoint, as far as a comparison asks."""

from __future__ import annotations

import json
from pathlib import Path

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.regular_file import read_whole
from ckptdiff.checkpoint.tied_models import TIED_BY_DEFAULT
from ckptdiff.errors import CheckpointError

__all__ = ["says_tied"]

_MAX_BYTES = 10_000_000


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
    if not checkpoint.shards:
        return False, None
    named = checkpoint.shards[0].path if checkpoint.index is None else checkpoint.index.path
    path = Path(named).parent / "config.json"
    try:
        # Not the strict reader: transformers writes Infinity.
        config = json.loads(read_whole(str(path), _MAX_BYTES))
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False, None
        return False, f"{path} is not used: {error.problem}"
    except (ValueError, RecursionError):
        return False, f"{path} is not used: it is not valid JSON"
    if not isinstance(config, dict):
        return False, f"{path} is not used: it is not a JSON object"
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return True in said if said else any(str(part.get("model_type")) in TIED_BY_DEFAULT for part in parts), None
