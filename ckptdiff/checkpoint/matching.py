"""Match the names of two checkpoints: exactly, by the user's renames, then without wrapper prefixes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ckptdiff.checkpoint.names import locate
from ckptdiff.checkpoint.renames import parse_renames, rename_all
from ckptdiff.errors import first_few, plural

__all__ = ["is_adapter_part", "match_names", "unwrapped"]

# module: DataParallel; _orig_mod: torch.compile; base_model.model: PEFT; the others: a model inside a model with a
# head or with a vision tower, which transformers has spelt in several ways.
_PREFIX = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model|model|language_model|visual|vision_tower"
    r"|transformer|bert|roberta|distilbert|gpt_neox)\.)+"
)
# base_layer: what PEFT wraps; of a module that it saves whole, the model uses the copy in modules_to_save.
_INNER = re.compile(
    r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
_ADAPTER = re.compile(r"(?:^|\.)(?:lora|vera|hada|lokr|oft|ia3)_\w+(?:\.|$)")


def match_names(
    base: Iterable[str], tuned: Iterable[str], renames: Sequence[str] = ()
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the tuned side's name of each of the base's tensors.

    Parameters
    ----------
    base, tuned : iterable of str
        Raw names.
    renames : sequence of str
        ``OLD=NEW`` substitutions on the base's names.

    Returns
    -------
    dict of str to str
        Base name to tuned name, one to one.
    tuple of str
        Warnings: renames without effect, and names that more than one match would fit.

    Raises
    ------
    OptionError
        A rename that cannot be used.
    """
    renamed, warnings = rename_all(base, parse_renames(renames))
    candidates = dict.fromkeys(tuned)
    matched = {name: new for name, new in renamed.items() if new in candidates}
    taken = set(matched.values())
    left_base: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    left_tuned: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, new in renamed.items():
        if name not in matched:
            left_base[unwrapped(new)].append(name)
    for name in candidates:
        if name not in taken:
            left_tuned[unwrapped(name)].append(name)
    ambiguous: list[str] = []
    for bare, ours in left_base.items():
        theirs = left_tuned.get(bare, [])
        if len(ours) == len(theirs) == 1:
            matched[ours[0]] = theirs[0]
        elif theirs:
            ambiguous.append(f"{' and '.join(ours)} against {' and '.join(theirs)}")
    if ambiguous:
        warnings += (
            f"{plural(len(ambiguous), 'name')} could be that of more than one tensor without prefixes, left unmatched"
            f" (--map decides): {first_few(ambiguous, between='; ')}",
        )
    return matched, warnings


def is_adapter_part(name: str) -> bool:
    """Whether a tensor is one that PEFT adds to a model, as far as its name tells."""
    return _ADAPTER.search(name) is not None


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
