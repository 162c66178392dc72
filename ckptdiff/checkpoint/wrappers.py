"""Strip the prefixes that training frameworks and model classes wrap around a tensor's name."""

from __future__ import annotations

import re

from ckptdiff.checkpoint.names import locate

__all__ = ["unwrapped"]

# module: DataParallel; _orig_mod: torch.compile; base_model.model: PEFT; the others: a model inside a model with a
# head or with a vision tower, which transformers has spelt in several ways.
_PREFIX = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model|model|language_model|visual|vision_tower"
    r"|transformer|bert|roberta|distilbert|gpt_neox)\.)+"
)
_INNER = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(name: str) -> tuple[str, str]:
    """Strip every wrapper prefix from a name.

    Returns
    -------
    tuple of (str, str)
        The tower and the bare name. Two names are the same tensor's only if both agree: a vision tower's
        ``layers.0`` is not the language model's.

    Examples
    --------
    >>> unwrapped("module.model.language_model.layers.0.mlp.up_proj.weight")
    ('language', 'layers.0.mlp.up_proj.weight')
    """
    return locate(name).tower, _INNER.sub("", _PREFIX.sub("", name))
