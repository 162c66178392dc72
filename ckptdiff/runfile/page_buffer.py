"""Small writes gathered into pages, as HDF5 makes several of a few hundred bytes for each mask."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["PageBuffer"]

_PAGE = 1 << 16
_PAGES = 16


class PageBuffer:
    """The parts of a file that were written last, at most 1 MiB of it.

    Parameters
    ----------
    read, write : callable
        Given an offset and a memoryview, reads or writes that many bytes of the file; they keep failures to themselves.
    """

    def __init__(self, read: Callable[[int, memoryview], object], write: Callable[[int, memoryview], object]) -> None:
        self._read, self._write = read, write
        self._pages: dict[int, tuple[memoryview, list[int]]] = {}
        self._size = 0

    def put(self, offset: int, data: memoryview) -> None:
        """Take a write of any size; one of a page or more goes out at once."""
        size = len(data)
        if size >= _PAGE:
            self.flush()
            self._out(offset, data)
            return
        number, first = divmod(offset, _PAGE)
        held = self._pages.get(number)
        if held is not None and first + size <= _PAGE:  # nearly every write
            page, span = held
            page[first : first + size] = data
            if first < span[0]:
                span[0] = first
            if first + size > span[1]:
                span[1] = first + size
            return
        start = 0
        while start < len(data):
            number, first = divmod(offset + start, _PAGE)
            stop = min(len(data), start + _PAGE - first)
            last = first + stop - start
            page, span = self._pages.get(number) or self._new(number, first)
            page[first:last] = data[start:stop]
            if first < span[0]:
                span[0] = first
            if last > span[1]:
                span[1] = last
            start = stop

    def flush(self) -> None:
        """Write what is held, in the order of the file, and hold nothing any more."""
        for number in sorted(self._pages):
            page, (first, last) = self._pages.pop(number)
            self._out(number * _PAGE + first, page[first:last])

    def drop(self) -> None:
        """Hold nothing any more."""
        self._pages.clear()

    def _out(self, offset: int, data: memoryview) -> None:
        self._size = max(self._size, offset + len(data))
        self._write(offset, data)

    def _new(self, number: int, first: int) -> tuple[memoryview, list[int]]:
        if len(self._pages) >= _PAGES:
            self.flush()
        page = memoryview(bytearray(_PAGE))
        if number * _PAGE < self._size:
            # What lies between two writes to the page is written with them.
            self._read(number * _PAGE, page)
        self._pages[number] = page, [first, first]
        return self._pages[number]
