"""Read pickles as data: what they would make is described, nothing is imported, looked up or called.

A pickle is a program for a small stack machine. This one knows the instructions that make plain values, and makes an
inert :class:`Made` of each call of a class that is on its list; it refuses every other class by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptdiff.checkpoint.torch_classes import KNOWN_CLASSES
from ckptdiff.errors import HeaderError

__all__ = ["Made", "Named", "Persistent", "attributes", "bare_name", "unpickle"]

_LONGEST = 1000
"""Bytes of a number."""
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.nn": "torch.nn.parameter"}


@dataclass(frozen=True, slots=True)
class Named:
    """A class or a function that a pickle names, such as "torch.float32"."""

    name: str


@dataclass(frozen=True, slots=True)
class Persistent:
    """What a pickle says of something that is kept outside it."""

    described: object


class Made:
    """What a call of a known class would make; each is equal to itself alone.

    Attributes
    ----------
    of : str
        The class or function, such as "torch._utils._rebuild_tensor_v2".
    args : tuple
        What it would be called with.
    state : object
        What it would be given after that, if anything.
    """

    __slots__ = ("args", "of", "state")

    def __init__(self, of: str, args: tuple[Any, ...]) -> None:
        self.of, self.args = of, args
        self.state: object = None

    @property
    def kind(self) -> str:
        """The name without its module."""
        return bare_name(self.of)

    def fields(self) -> dict[Any, Any]:
        """The attributes that it would have."""
        return attributes(self.state)


def attributes(state: object) -> dict[Any, Any]:
    """The attributes in a state: a dict, or a pair of those in ``__dict__`` and of those in slots."""
    parts = state if isinstance(state, tuple) else (state,)
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def bare_name(name: str) -> str:
    """A name without its module."""
    return name.rpartition(".")[2]


def unpickle(raw: bytes, file: str, what: str = "the pickle in it") -> object:
    """Read a pickle of protocol 2 or later.

    Parameters
    ----------
    raw : bytes
    file : str
        Where it lies, for messages.
    what : str
        What it is, for messages.

    Returns
    -------
    object
        None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these; :class:`Named`, :class:`Made`
        and :class:`Persistent` for all else. An OrderedDict is a dict, a torch.Size a tuple. It may hold itself.

    Raises
    ------
    HeaderError
        A class that is not on the list, an instruction that is not known, or bytes that are no pickle.
    """
    machine = _Machine(raw)
    try:
        return machine.run()
    except _UnknownClassError as error:
        raise HeaderError(
            f"{what} asks for a class that state dicts are not made of, and nothing in it is run",
            file=file,
            expected="tensors, numbers, text, and lists and dicts of these",
            found=str(error),
            hint="save the weights alone, as of torch.save(model.state_dict(), FILE)",
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, struct.error, MemoryError, OverflowError) as error:
        raise HeaderError(
            f"{what} is damaged, or of an unknown kind",
            file=file,
            expected="a pickle of protocol 2 to 5",
            found=f"{error or type(error).__name__} at byte {machine.at}",
            hint="fetch or save it again",
        ) from None


class _UnknownClassError(Exception):
    """A class or function that is not on the list."""


_MARK = object()


class _Machine:
    """The stack machine, with every instruction that can be in a pickle of plain values and of known classes."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self.at = raw, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        steps, raw = _STEPS, self._raw
        while True:
            if self.at >= len(raw):
                raise ValueError("it ends early")
            code = raw[self.at]
            self.at += 1
            if code == _STOP:
                return self.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"instruction 0x{code:02x}")
            step(self)

    def skip(self, count: int) -> None:
        self.take(count)

    def drop(self) -> None:
        self._stack.pop()

    def take(self, count: int) -> bytes:
        """The next bytes."""
        piece = self._raw[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError("it ends early")
        self.at += count
        return piece

    def number(self, form: str) -> Any:
        """The next number, in a form of `struct`."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def line(self) -> str:
        """The next line."""
        end = self._raw.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: object) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def pop_mark(self) -> list[Any]:
        """All that lies above the last mark."""
        found: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        self.push(_known(_OLD_NAMES.get(module, module), name))

    def call(self, args: Any, of: Any) -> None:
        if not isinstance(of, Named) or not isinstance(args, tuple):
            raise TypeError("a call of something that is no class")
        plain = _PLAIN.get(of.name)
        self.push(Made(of.name, args) if plain is None else plain(*args))

    def build(self) -> None:
        state, built = self.pop(), self.top()
        if isinstance(built, Made):
            built.state = state
        elif not isinstance(built, dict):  # an OrderedDict may have attributes of its own, which are no entries
            raise TypeError("a state for a value that has none")

    def whole(self, size: int) -> None:
        if size > _LONGEST:  # text of it would take for ever
            raise ValueError(f"a number of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise TypeError("entries for something that is no list")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("entries for something that is no dict")
        target.update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def add(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise TypeError("entries for something that is no set")
        target.update(map(_key, values))

    def remember(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self.top()

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))


def _known(module: str, name: str) -> Named:
    if name not in KNOWN_CLASSES.get(module, ()):
        raise _UnknownClassError(ascii(f"{module}.{name}")[1:-1][:200])
    return Named(f"{module}.{name}")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("text in another encoding")
    return text.encode("latin1")


def _nested(outer: Named, name: str) -> Named:
    """A class inside another one, which protocols below 4 name by a call of getattr."""
    module, _, own = outer.name.rpartition(".")
    return _known(module, f"{own}.{name}")


def _as_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


def _key(value: Any) -> Any:
    """What may be a key: the hash of tuples inside each other without end would run out of stack, and crash."""
    for one in value if isinstance(value, tuple) else (value,):
        if not isinstance(one, (str, bytes, int, float, Made, Named)) and one is not None:
            raise TypeError(f"a key that is, or holds, a {type(one).__name__}")
    return value


_PLAIN: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": _as_dict,
    "collections.defaultdict": lambda default=None, pairs=(): _as_dict(pairs),
    "builtins.set": lambda values=(): set(map(_key, values)),
    "builtins.frozenset": lambda values=(): frozenset(map(_key, values)),
    "builtins.getattr": _nested,
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": lambda *given: bytes(given[0]) if given and isinstance(given[0], bytes) else _encode(*given),
    "_codecs.encode": _encode,
    "torch.Size": lambda sizes=(): tuple(sizes),
}
"""What is made a plain value; all of these only copy what they are given."""

_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.skip(1),  # PROTO
    0x95: lambda m: m.skip(8),  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8A: lambda m: m.whole(m.number("<B")),
    0x8B: lambda m: m.whole(m.number("<I")),
    0x8C: lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    ord("X"): lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    0x8D: lambda m: m.push(m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
    ord("U"): lambda m: m.push(m.take(m.number("<B")).decode()),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # a bytearray
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.push(set()),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord("s"): lambda m: m.update([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.update(m.pop_mark()),
    0x90: lambda m: m.add(m.pop_mark()),
    0x91: lambda m: m.push(frozenset(map(_key, m.pop_mark()))),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("0"): lambda m: m.drop(),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(None),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*[m.pop(), m.pop()][::-1]),
    ord("R"): lambda m: m.call(m.pop(), m.pop()),
    0x81: lambda m: m.call(m.pop(), m.pop()),
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.push(Persistent(m.pop())),
}
