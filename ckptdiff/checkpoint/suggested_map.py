"""Propose ``--map`` rules for tensors that each side stores under a name of its own."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import product
from math import sqrt
from typing import Final, TypeAlias

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.renames import parse_renames, rename_all
from ckptdiff.errors import OptionError, first_few, plural

__all__ = ["Agreement", "SuggestedMap", "advice", "suggest_map"]

Agreement: TypeAlias = Callable[[TensorInfo, TensorInfo], tuple[int, int]]
"""Reads a sample of two tensors of one shape: how many values are equal, and how many were looked at."""

_MOST_RULES: Final = 24
_MOST_FORMS: Final = 400
"""Forms of names on a side, beyond which nothing is proposed: the two are no models that could be paired."""
_MOST_TRIES: Final = 40
_MOST_PAIRS: Final = 4000
"""Pairs of forms that fit, beyond which only those count whose last two parts are equal: a prefix that explains all
names is found among any number."""
_MOST_CANDIDATES: Final = 150
_MOST_RIVALS: Final = 64
_TELLING: Final = 100
"""Values of a sample, from which on it can speak against a pair."""
_ALIKE: Final = 0.02
"""Share of equal values above which a sample speaks for one: of unrelated weights a few in a thousand are."""
_ANYWHERE: Final = {"#", "weight", "bias"}
"""Parts that names of any two models share."""
_NUMBER: Final = re.compile(r"(?<![^.])[0-9]+(?![^.])")

_Form: TypeAlias = str  # a name with "#" for each part that is a number
_Tensors: TypeAlias = Mapping[tuple[str, ...], TensorInfo]
_Moves: TypeAlias = Mapping[_Form, _Form]


@dataclass(frozen=True, slots=True)
class SuggestedMap:
    """Rules that would pair tensors without a counterpart.

    Attributes
    ----------
    rules : tuple of str
        ``OLD=NEW`` for ``--map``, in order, after those of the user.
    pairs : int
        Tensors that they pair.
    undecided : tuple of str
        Names only in base that shapes and samples give to more than one tensor; nothing is proposed for them.
    """

    rules: tuple[str, ...] = ()
    pairs: int = 0
    undecided: tuple[str, ...] = ()

    @property
    def advice(self) -> str | None:
        """The rules as options of a command line; None if there are none."""
        return advice(self.rules) and f"{advice(self.rules)} (pairs {plural(self.pairs, 'tensor')})"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be decided, in words."""
        if not self.undecided:
            return ()
        which = f"{plural(len(self.undecided), 'tensor')} only in base could be any of several only in tuned"
        return (f"{which}, by shape and by what was looked at of their values: {first_few(self.undecided)}",)


def advice(rules: Sequence[str]) -> str | None:
    """Rules as options of a command line, quoted for a shell; None if there are none."""
    return " ".join(f"--map {shlex.quote(rule)}" for rule in rules) or None


def suggest_map(
    base: Checkpoint,
    tuned: Checkpoint,
    matched: Mapping[str, str],
    only_in_base: Sequence[str],
    only_in_tuned: Sequence[str],
    renames: Sequence[str] = (),
    agreement: Agreement | None = None,
) -> SuggestedMap:
    """Find the fewest rules that pair the most values.

    Each rule is the one that pairs the most values among those that differ between a name of the base and one of the
    tuned side. Tensors of a pair have one shape, and types that can be compared. Where rules contradict each other, a
    sample of the values decides; where it does not, and neither pairs more, none is proposed.

    Parameters
    ----------
    base, tuned : Checkpoint
    matched : mapping of str to str
        The pairs there are, which no rule may undo.
    only_in_base, only_in_tuned : sequence of str
    renames : sequence of str
        The user's own rules.
    agreement : callable, optional
        Without it no data is read.
    """
    if not only_in_base or not only_in_tuned:
        return SuggestedMap()
    renamed, _ = rename_all(base.tensors, parse_renames(renames))
    ours = _by_form({renamed[name]: base.tensors[name] for name in only_in_base})
    theirs = _by_form({name: tuned.tensors[name] for name in only_in_tuned})
    if max(len(ours), len(theirs)) > _MOST_FORMS:
        return SuggestedMap()
    fixed = {_form(renamed[name]) for name in matched}
    idle = {_form(name) for name in renamed.values()} - fixed - ours.keys()
    search = _Search(ours, theirs, fixed, idle, agreement)
    rules = search.run()
    undecided = tuple(tensor.name for tensors in search.undecided for tensor in tensors.values())
    if not rules:
        return SuggestedMap(undecided=undecided)
    # The proof: what the command line would make of them.
    try:
        new, _ = match_names(base.tensors, tuned.tensors, (*renames, *rules))
    except OptionError:  # names that are not what their forms are taken for, such as "a.#"
        return SuggestedMap(undecided=undecided)
    gained = new.keys() - matched.keys()
    kept = all(new.get(name) == other for name, other in matched.items())
    if not kept or not all(_fits(base.tensors[name], tuned.tensors[new[name]]) for name in gained):
        return SuggestedMap(undecided=undecided)
    return SuggestedMap(tuple(rules), len(gained), undecided)


class _Search:
    """The state of one search: what is left of both sides, and what was found."""

    def __init__(
        self,
        ours: dict[_Form, _Tensors],
        theirs: dict[_Form, _Tensors],
        fixed: set[_Form],
        idle: Iterable[_Form],
        agreement: Agreement | None,
    ) -> None:
        self.ours, self.theirs, self.fixed, self.agreement = ours, theirs, fixed, agreement
        self.idle = list(idle)  # not to be paired: a rule may change them, but not into another name of the base
        self.undecided: list[_Tensors] = []
        self._known: dict[tuple[int, int], int] = {}
        self._held = (*ours.values(), *theirs.values())  # so that no other takes their identity
        self._sampled: dict[tuple[str, str], tuple[int, int]] = {}

    def run(self) -> list[str]:
        rules: list[str] = []
        for _ in range(_MOST_TRIES):
            found = self._candidates()
            if not found or len(rules) == _MOST_RULES:
                break
            rule, moves = found[0]
            rivals = [(text, other) for text, other in found[1:] if _contradict(moves, other)][:_MOST_RIVALS]
            better = [rival for rival in rivals if self._beats(rival[1], moves)]
            if better:
                rule, moves = better[0]
                rivals = [one for one in found if _contradict(moves, one[1])][:_MOST_RIVALS]
            equal = [
                other
                for _, other in rivals
                if not self._beats(moves, other) and self._values(other) >= self._values(moves)
            ]
            if equal or not self._is_likely(moves):
                contested = {form for form in moves if any(_meet(form, moves, other) for other in equal)} or set(moves)
                if equal:
                    self.undecided += [self.ours[form] for form in contested]
                for form in contested:
                    del self.ours[form]
                    self.idle.append(form)
                continue
            rules.append(rule)
            self._apply(rule, moves)
        return rules

    def _apply(self, rule: str, moves: _Moves) -> None:
        (rename,) = parse_renames([rule])
        for form, other in moves.items():
            del self.ours[form], self.theirs[other]
            self.fixed.add(other)
        self.idle = [_renamed(form, rename.pattern, rename.replacement) for form in self.idle]
        self.ours = {_renamed(form, rename.pattern, rename.replacement): held for form, held in self.ours.items()}

    def _candidates(self) -> list[tuple[str, _Moves]]:
        """Rules with the forms that each pairs: those of most values first, of these the ones that touch least."""
        votes: defaultdict[str, int] = defaultdict(int)
        fitting = [
            (form, other, values)
            for (form, held), (other, there) in product(self.ours.items(), self.theirs.items())
            if (values := self._common(held, there))
        ]
        if len(fitting) > _MOST_PAIRS:
            fitting = [one for one in fitting if one[0].split(".")[-2:] == one[1].split(".")[-2:]][:_MOST_PAIRS]
        for form, other, values in fitting:
            for text in _rules(form, other):
                votes[text] += values
        found = []
        for text in sorted(votes, key=lambda text: (-votes[text], len(text), text))[:_MOST_CANDIDATES]:
            (rename,) = parse_renames([text])
            new = {form: _renamed(form, rename.pattern, rename.replacement) for form in self.ours}
            all_new = [*new.values(), *(_renamed(form, rename.pattern, rename.replacement) for form in self.idle)]
            is_safe = len(set(all_new)) == len(all_new) and self.fixed.isdisjoint(all_new)
            if is_safe and all(_renamed(form, rename.pattern, rename.replacement) == form for form in self.fixed):
                moves = {
                    form: other
                    for form, other in new.items()
                    if other in self.theirs and self._common(self.ours[form], self.theirs[other])
                }
                if moves:
                    touched = sum(form != other for form, other in new.items())
                    found.append((-self._values(moves), touched - len(moves), len(text), text, moves))
        return [(text, moves) for *_, text, moves in sorted(found, key=lambda one: one[:4])]

    def _common(self, ours: _Tensors, theirs: _Tensors) -> int:
        key = id(ours), id(theirs)
        if key not in self._known:
            self._known[key] = _common_values(ours, theirs)
        return self._known[key]

    def _values(self, moves: _Moves) -> int:
        return sum(self._common(self.ours[form], self.theirs[other]) for form, other in moves.items())

    def _beats(self, moves: _Moves, others: _Moves) -> bool:
        """Whether samples are clearly more alike where two rules contradict each other."""
        contested = [form for form in moves if _meet(form, moves, others)]
        back = {other: form for form, other in others.items()}
        against = {
            (form, others[form]) if form in others else (back[moves[form]], moves[form])
            for form in contested
            if form in others or moves[form] in back
        }
        mine, seen = self._agreed((form, moves[form]) for form in contested)
        theirs, there = self._agreed(against)
        if not seen or not there:
            return False
        # Three standard deviations of the difference of two counts.
        return mine / seen - theirs / there > 3.0 * sqrt((mine + 1) / seen**2 + (theirs + 1) / there**2)

    def _is_likely(self, moves: _Moves) -> bool:
        """Whether more than the shape speaks for a pair: the module's own name, some values, or else parts of names."""
        names = [(form.split("."), other.split(".")) for form, other in moves.items()]
        if any(len(one) > 1 and one[-2:] == other[-2:] for one, other in names):
            return True
        equal, seen = self._agreed(moves.items())
        if seen >= _TELLING:
            return equal > _ALIKE * seen
        return any(set(one) & set(other) - _ANYWHERE for one, other in names)

    def _agreed(self, pairs: Iterable[tuple[_Form, _Form]]) -> tuple[int, int]:
        equal = seen = 0
        for form, other in pairs:
            held, there = self.ours[form], self.theirs[other]
            number = next(number for number in held if number in there)
            one, two = held[number], there[number]
            key = one.name, two.name
            if key not in self._sampled:
                both = self.agreement is not None and one.kind is two.kind is Kind.FLOAT
                self._sampled[key] = self.agreement(one, two) if both and self.agreement else (0, 0)
            equal, seen = equal + self._sampled[key][0], seen + self._sampled[key][1]
        return equal, seen


def _form(name: str) -> _Form:
    return _NUMBER.sub("#", name)


def _by_form(tensors: Mapping[str, TensorInfo]) -> dict[_Form, _Tensors]:
    """Tensors by the form of their name, and then by the numbers in it."""
    found: defaultdict[_Form, dict[tuple[str, ...], TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found[_form(name)][tuple(_NUMBER.findall(name))] = tensor
    return dict(found)


def _renamed(form: _Form, pattern: re.Pattern[str], replacement: str) -> _Form:
    return _form(pattern.sub(replacement, form.replace("#", "0")))


def _fits(one: TensorInfo, other: TensorInfo) -> bool:
    alike = one.dtype == other.dtype or one.kind is other.kind is Kind.FLOAT
    return alike and one.shape == other.shape


def _common_values(ours: _Tensors, theirs: _Tensors) -> int:
    """Values of the tensors of equal numbers; 0 if any of them do not fit."""
    common = ours.keys() & theirs.keys()
    if not all(_fits(ours[number], theirs[number]) for number in common):
        return 0
    return sum(ours[number].numel for number in common)


def _meet(form: _Form, moves: _Moves, others: _Moves) -> bool:
    """Whether another rule pairs a form with something else, or something else with its counterpart."""
    if form in others:
        return others[form] != moves[form]
    return moves[form] in others.values()


def _contradict(moves: _Moves, others: _Moves) -> bool:
    return any(_meet(form, moves, others) for form in moves)


@lru_cache(maxsize=1 << 16)
def _rules(form: _Form, other: _Form) -> frozenset[str]:
    """Rules that make parts of one form those of another: for each run that differs, and for all of them as one."""
    old, new = form.split("."), other.split(".")
    runs = [run[1:] for run in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if run[0] != "equal"]
    if len(runs) > 1:
        runs.append((runs[0][0], runs[-1][1], runs[0][2], runs[-1][3]))
    found = set()
    for start, stop, first, last in runs:
        # Context tells two places apart; where there is nothing to replace, some is needed.
        for left, right in ((0, 0), (1, 0), (0, 1), *([(0, 2)] if start == stop else ())):
            if left > min(start, first) or right > min(len(old) - stop, len(new) - last):
                continue
            text = _rule(old, new, (start - left, stop + right), (first - left, last + right))
            if text is not None:
                found.add(text)
    return frozenset(found)


def _rule(old: list[str], new: list[str], here: tuple[int, int], there: tuple[int, int]) -> str | None:
    parts, others = old[slice(*here)], new[slice(*there)]
    if parts.count("#") != others.count("#") or any("=" in part for part in others):
        return None
    if not parts and here[0]:
        return None
    at_start, at_end = here[0] == 0, here[1] == len(old)
    if at_start != (there[0] == 0) or at_end != (there[1] == len(new)) or (at_end and not (parts and others)):
        return None
    pattern = "".join(("([0-9]+)" if part == "#" else re.escape(part)) + r"\." for part in parts)
    numbers = iter(range(1, len(parts) + 1))
    text = "".join((rf"\{next(numbers)}" if part == "#" else part.replace("\\", r"\\")) + "." for part in others)
    if at_end:
        pattern, text = pattern.removesuffix(r"\.") + "$", text.removesuffix(".")
    return f"^{pattern}={text}" if at_start else rf"\.{pattern}=.{text}"
