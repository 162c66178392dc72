"""Find the model's part of what a trainer saved: nested dicts that may hold an optimizer and much else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptdiff.errors import CheckpointError, first_few, plural

__all__ = ["ModelPart", "find_model"]

_MODEL = "model", "state_dict", "model_state_dict", "module"
"""What trainers call the part that holds the weights."""
_TRAINING = re.compile(
    r"optim|lr_sched|sched|scaler|grad_scaler|rng|random_state|callbacks|loops|data_?loader|sampler|train|hyper_?param"
    r"|extra_state|args|config|amp$|native_amp|mixedprecision",
    re.IGNORECASE,
)
"""How names of dicts begin that belong to the training."""
_COUNTER = re.compile(r"(?:global_)?(?:step|epoch|iteration|loss)|(?:\w+_)?rng_states?(?:_\w+)?", re.IGNORECASE)
"""Names of single tensors that do."""
_DEEPEST = 20
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The tensors of the model.

    Attributes
    ----------
    tensors : mapping of str to object
        By name; names of nested dicts are joined with dots.
    path : tuple of str
        The keys that lead to it; empty if it is the whole.
    left_out : mapping of str to int
        How many tensors lie in each other part of the whole.
    """

    tensors: Mapping[str, Any]
    path: tuple[str, ...]
    left_out: Mapping[str, int]

    def said(self, path: str) -> str | None:
        """What the user should know of the choice, if anything was left out."""
        if not self.left_out:
            return None
        taken = f"its part {'/'.join(self.path)!a} is read" if self.path else "its weights are read"
        others = [f"{name!a} ({plural(count, 'tensor')})" for name, count in self.left_out.items()]
        return f"{path}: {taken}, and not {first_few(others, _SHOWN)}; {path}#PART names another part"


class _Walk:
    """Looks through what was saved, which may hold itself."""

    def __init__(self, is_tensor: Callable[[Any], bool], file: str, most: int) -> None:
        self.is_tensor, self.file, self._most, self._left = is_tensor, file, most, most

    def tensors(self, value: object, name: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """All tensors in it, by name."""
        self._left -= 1
        if len(name) > _DEEPEST or self._left < 0:
            raise CheckpointError(
                "it is nested too deeply, or holds itself",
                file=self.file,
                expected=f"at most {_DEEPEST} levels, and {self._most} dicts, lists and tensors",
                found=ascii(".".join(name))[:200],
            )
        if self.is_tensor(value):
            yield ".".join(name), value
        for key, inside in _items(value):
            if isinstance(inside, (dict, list, tuple)) or self.is_tensor(inside):
                yield from self.tensors(inside, (*name, key))

    def model_in(self, level: object, *, parts_are_one: bool) -> str | None:
        """Which key of a level holds the weights; None if the level itself does."""
        if _is_optimizer(level):
            return None
        inside = dict(_items(level))
        parts = [
            key
            for key, value in inside.items()
            if not self.is_tensor(value) and next(self.tensors(value), None) is not None
        ]
        named = [key for key in parts if key in _MODEL]
        if len(named) == 1:
            return named[0]
        if any(self.is_tensor(value) and not _COUNTER.fullmatch(key) for key, value in inside.items()):
            return None
        weights = named or [key for key in parts if not _is_training(key, inside[key])]
        if len(weights) < 2 or parts_are_one:
            return weights[0] if len(weights) == 1 and not parts_are_one else None
        raise CheckpointError(
            "several of its parts may be the model",
            file=self.file,
            expected="one",
            found=first_few(map(ascii, weights), _SHOWN),
            hint=f"name one: {self.file}#{weights[0]}",
        )


def find_model(
    saved: object,
    is_tensor: Callable[[Any], bool],
    file: str,
    part: str | None = None,
    most: int = 5_000_000,
) -> ModelPart:
    """Find the model's part.

    At each level the only key that trainers use for the weights is followed. Else the level itself is taken, if it
    holds tensors, without what belongs to the training; else its only part that does not.

    Parameters
    ----------
    saved : object
        Dicts, lists and tuples in each other, with tensors among their values.
    is_tensor : callable
    file : str
        For messages.
    part : str, optional
        What the user asks for, such as "ema" or "state/ema".
    most : int
        Dicts, lists and tensors that are looked at, some of them several times.

    Raises
    ------
    CheckpointError
        No such part, no tensors but the training's, several parts that may be meant, or two tensors of one name.
    """
    walk = _Walk(is_tensor, file, most)
    path: tuple[str, ...] = ()
    chosen = saved
    for key in part.split("/") if part else ():
        inside = dict(_items(chosen))
        if key not in inside:
            expected = f"one of {first_few(map(ascii, inside), _SHOWN)}" if inside else "no part, as it has none"
            raise CheckpointError("there is no such part", file=file, expected=expected, found=ascii(part))
        chosen, path = inside[key], (*path, key)
    while not is_tensor(chosen) and (found := walk.model_in(chosen, parts_are_one=bool(path))) is not None:
        chosen, path = dict(_items(chosen))[found], (*path, found)
    if not path:
        kept_parts = () if _is_optimizer(saved) else _items(saved)
        chosen = {key: value for key, value in kept_parts if not _is_training(key, value, is_tensor)}
    kept = path[:1] if path else dict(_items(chosen)).keys()
    left_out = {
        key: count for key, value in _items(saved) if key not in kept and (count := sum(1 for _ in walk.tensors(value)))
    }
    tensors: dict[str, Any] = {}
    for name, tensor in walk.tensors(chosen):
        if tensors.setdefault(name, tensor) is not tensor:
            raise CheckpointError("two tensors have one name", file=file, tensor=name, expected="a name each")
    if not tensors:
        others = f"tensors in {first_few(map(ascii, left_out), _SHOWN)} alone"
        raise CheckpointError(
            "there are no weights in it",
            file=file,
            expected="a dict of tensors",
            found="a tensor without a name" if is_tensor(saved) else others if left_out else "no tensor",
            hint="name the file or the folder that holds the model",
        )
    return ModelPart(tensors, path, left_out)


def _items(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), inside) for key, inside in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), inside) for number, inside in enumerate(value))


def _is_training(key: str, value: object, is_tensor: Callable[[Any], bool] = lambda _: False) -> bool:
    if is_tensor(value):
        return _COUNTER.fullmatch(key) is not None
    return _TRAINING.match(key) is not None or _is_optimizer(value)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()
