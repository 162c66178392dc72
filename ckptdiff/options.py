"""Hold the options of a run: one frozen record, validated when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from ckptdiff.errors import OptionError

_Text = TypeVar("_Text", bound=str | os.PathLike[str])
_LEADING = 64
"""Singular values that the spectra list."""

Compare: TypeAlias = Literal["bf16", "stored"]
Values: TypeAlias = Literal["model", "codes"]
SpectraMode: TypeAlias = Literal["randomized", "exact"]
Io: TypeAlias = Literal["auto", "mmap", "pread"]
RuleKind: TypeAlias = Literal["bitwise", "abs", "eta", "rel", "top", "none", "combined"]

_MEANING = {
    "abs": "a threshold such as abs:1e-5",
    "eta": "a relative threshold such as eta:1e-3",
    "rel": "a threshold in units of RMS(W0) such as rel:1e-3",
    "top": "a percentage such as top:20",
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?|reference")
_SUFFIX = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which coordinates belong to the mask.

    ``bitwise``, ``abs:EPS``, ``eta:ETA``, ``rel:TAU`` (in units of RMS(W0)), ``top:PERCENT``, or ``none``; in run files
    also ``combined``: masks that were made of others, which no diff can make.

    Attributes
    ----------
    kind : {"bitwise", "abs", "eta", "rel", "top", "none", "combined"}
    value : float
        The threshold, or the percentage of ``top``; 0 for rules without one.

    Examples
    --------
    >>> from ckptdiff import MaskRule
    >>> rule = MaskRule.parse("top:20")
    >>> rule.kind, rule.value
    ('top', 20.0)
    >>> print(MaskRule("abs", 1e-5))
    abs:1e-05
    """

    kind: RuleKind
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> MaskRule:
        """Read a rule such as ``abs:1e-5``.

        Raises
        ------
        OptionError
            If the rule is unknown or its number is missing, negative, not finite, or over 100 for ``top``.
        """
        kind, _, number = text.partition(":")
        if kind in ("bitwise", "none", "combined") and ":" not in text:
            return cls(cast(RuleKind, kind))
        if kind not in _MEANING:
            raise OptionError(
                "unknown mask rule", expected="bitwise, abs:EPS, eta:ETA, rel:TAU, top:PERCENT or none", found=text
            )
        try:
            value = float(number)
        except ValueError:
            raise OptionError("mask rule without its number", expected=_MEANING[kind], found=text) from None
        if not 0 <= value < float("inf") or (kind == "top" and not 0 < value <= 100):
            raise OptionError("mask rule with a number out of range", expected=_MEANING[kind], found=text)
        return cls(cast(RuleKind, kind), value)

    def __str__(self) -> str:
        if self.kind not in _MEANING:
            return self.kind
        short = f"{self.value:g}"
        return f"{self.kind}:{short if float(short) == self.value else repr(self.value)}"


def parse_size(text: str) -> int:
    """Read a size in bytes such as ``400M``, ``2GiB`` or ``1.5g`` (powers of 1024).

    Parameters
    ----------
    text : str
        A positive number with an optional K, M, G or T, in either case, and an optional B or iB.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    OptionError
        If the text is not a positive number with an optional K, M, G or T.

    Examples
    --------
    >>> from ckptdiff import parse_size
    >>> parse_size("1.5g")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    size = float(match[1]) * _SUFFIX[match[2].lower()] if match else 0.0
    if not 1 <= size < 1 << 63:
        raise OptionError("not a size", expected="a size such as 400M or 2G", found=text)
    return int(size)


def as_bytes(size: str | int) -> int:
    """A size in bytes, given as a number or as text for :func:`parse_size`; OptionError if the text is not a size."""
    return parse_size(size) if isinstance(size, str) else size


def as_tuple(name: str, given: Sequence[_Text]) -> tuple[_Text, ...]:
    """Several globs, names or paths as a tuple; OptionError for a single one, of which each character would count."""
    if isinstance(given, str | os.PathLike):
        raise OptionError(f"{name} takes several", expected=f"a list: {name}=[{given!r}]", found=repr(given))
    return tuple(given)


def default_threads() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """Raise OptionError for a number of threads that is negative or over 1024."""
    if not 0 <= threads <= 1024:
        raise OptionError("number of threads out of range", expected="0 to 1024", found=threads)


@dataclass(frozen=True, slots=True)
class SpectraOptions:
    """What is asked of the spectral stage.

    Attributes
    ----------
    mode : {"randomized", "exact"}
    block, steps : int
        Vectors of a Krylov block, and how many blocks at most (randomized mode).
    seed : int
    limit : int
        Exact mode falls back to randomized where both sides of a matrix are longer.

    Raises
    ------
    OptionError
        If a value cannot be used.

    Examples
    --------
    >>> from ckptdiff import SpectraOptions
    >>> SpectraOptions("exact").limit
    8192
    """

    mode: SpectraMode = "randomized"
    block: int = 32
    steps: int = 10
    seed: int = 0
    limit: int = 8192

    def __post_init__(self) -> None:
        if self.mode not in get_args(SpectraMode):
            raise OptionError("unknown kind of spectra", expected=", ".join(get_args(SpectraMode)), found=self.mode)
        for name, least, most in (("block", 1, 1024), ("steps", 1, 1024), ("seed", 0, 2**63 - 1), ("limit", 1, 2**31)):
            if not least <= getattr(self, name) <= most:
                raise OptionError(
                    f"{name} of the spectra out of range", expected=f"{least} to {most}", found=getattr(self, name)
                )
        vectors = self.block * self.steps
        if vectors < 2 * _LEADING:
            raise OptionError("too few Krylov vectors", expected=f"{2 * _LEADING} or more in all", found=vectors)


def as_spectra(given: SpectraMode | SpectraOptions) -> SpectraOptions:
    """Spectra as they were asked for, by their mode alone or by a record; OptionError if there is no such mode."""
    return SpectraOptions(given) if isinstance(given, str) else given


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Which cluster does the tasks of a run; no figure depends on it.

    Attributes
    ----------
    address : str
        ``HOST:PORT`` of a Ray cluster; empty for the one that ``RAY_ADDRESS`` names, that runs on this machine, or that
        is started on it.
    parallel : int
        Tasks under way at a time, at most; 0 for as many as there is room for.
    task_bytes : int
        Bytes that a task reads; 0 stands for 1 to 4 GiB.
    seconds : float
        How long a task may wait for a node that can hold it, before the run is given up.
    environment : tuple of str
        Globs on names of environment variables that tasks get from this process.

    Raises
    ------
    OptionError
        If a number is negative, or the address is none.
    """

    address: str = ""
    parallel: int = 0
    task_bytes: int = 0
    seconds: float = 30.0
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.address and not re.fullmatch(r"auto|local|[^\s/@]+:\d{1,5}", self.address):
            raise OptionError(
                "not the address of a Ray cluster",
                expected="HOST:PORT, as ray start --head prints it",
                found=self.address,
                hint="a ray:// address is for Ray's own client: run ckptdiff on a machine of the cluster instead",
            )
        for name, value in (("--parallel", self.parallel), ("task_bytes", self.task_bytes)):
            if value < 0:
                raise OptionError(f"{name} out of range", expected="0 or more", found=value)


def ray_options(engine: str, address: str | None, parallel: int, environment: Sequence[str] = ()) -> RayOptions | None:
    """Which cluster is asked for; None for no cluster. OptionError if one is described and not asked for."""
    if engine == "ray":
        return RayOptions(address or "", parallel, environment=tuple(environment))
    if engine != "local":
        raise OptionError("unknown engine", expected="local or ray", found=engine)
    if address or parallel or environment:
        raise OptionError("an address, a number of tasks or variables for Ray without it", hint="--engine ray")
    return None


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one run, as the command line and :func:`ckptdiff.diff` take them.

    Attributes
    ----------
    compare : {"bf16", "stored"}
        Cast floating tensors of 16 bits and more to bfloat16 first, or compare the stored bits.
    values : {"model", "codes"}
        Decode quantised weights to what the model multiplies with, or compare codes and scales as they are stored.
    mask : MaskRule
        Which coordinates belong to the mask.
    renames : tuple of str
        ``OLD=NEW`` regex substitutions that turn names of the base into names of the tuned side.
    include, exclude : tuple of str
        Globs on tensor names.
    groups : tuple of str
        ``NAME=REGEX``: further groups of tensors to report.
    device : str
        "cpu", "cuda" or "cuda:N" (a GPU), "reference" (NumPy), or "auto": a GPU if one works, else the processor.
    threads : int
        Worker threads; 0 stands for one per available core.
    max_memory : int
        Bound on the peak resident size of the whole process, mapped pages included, in bytes. 0 stands for
        :data:`ckptdiff.memory.DEFAULT_MEMORY`, or for what all threads need if that is more, up to half of the
        machine's memory beyond what the process holds already; spectra have a larger default of their own.
    gpu_memory : int
        Bound on the GPU memory that is taken, in bytes; 0 stands for half of what is free.
    io : {"auto", "mmap", "pread"}
        "auto" is "pread".
    spectra : SpectraOptions, optional
        None measures no spectra.
    stream : bool
        Whether models of the hub are read where they are; else they are downloaded first.
    quick : bool
        Whether tensors that are known to be the same on both sides are left unread: those of one file, and of files
        that the hub gives the same hash.

    Raises
    ------
    OptionError
        If a value cannot be used.

    Examples
    --------
    >>> from ckptdiff import MaskRule, Options
    >>> options = Options(compare="stored", mask=MaskRule("bitwise"))
    >>> options.as_json()["mask"]
    'bitwise'
    """

    compare: Compare = "bf16"
    values: Values = "model"
    mask: MaskRule = MaskRule("abs", 1e-5)
    renames: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 0
    max_memory: int = 0
    gpu_memory: int = 0
    io: Io = "auto"
    spectra: SpectraOptions | None = None
    stream: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("compare", Compare), ("values", Values), ("io", Io)):
            if getattr(self, name) not in get_args(allowed):
                raise OptionError(
                    f"unknown value of {name}", expected=", ".join(get_args(allowed)), found=getattr(self, name)
                )
        if not _DEVICE.fullmatch(self.device):
            raise OptionError(
                "unknown value of device", expected="auto, cpu, cuda, cuda:N or reference", found=self.device
            )
        if self.mask.kind == "combined":
            raise OptionError("a diff has no masks to combine", found=self.mask, hint="ckptdiff mask combine")
        check_threads(self.threads)
        for bound in (self.max_memory, self.gpu_memory):
            if bound < 0:
                raise OptionError("negative memory bound", expected="a size in bytes, or 0", found=bound)
        self.group_patterns()

    def group_patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        """The user's groups as (name, pattern)."""
        patterns = []
        for text in self.groups:
            name, equals, pattern = text.partition("=")
            try:
                patterns.append((name, re.compile(pattern)))
            except (re.error, OverflowError, RecursionError) as error:
                raise OptionError(f"invalid regex of group {name!r}: {error}", found=text) from None
            if not (name and equals and pattern):
                raise OptionError("not a group", expected="NAME=REGEX", found=text)
        return patterns

    def as_json(self) -> dict[str, Any]:
        """The options as plain JSON values, for provenance."""
        values = {**asdict(self), "mask": str(self.mask)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
