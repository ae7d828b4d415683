"""Decoded atoms that were used last, bounded in bytes: for a few documents that many questions retrieve."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_qdrant.atoms.record import Record


class AtomCache:
    """The atoms of records, the least recently used one leaving first. Threads may share it.

    Args:
        limit: bytes of the decoded atoms and their records' texts; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._atoms: OrderedDict[Record, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._atoms)

    def get(self, record: Record, decode: Callable[[Record], Tensor]) -> Tensor:
        """The atom of the record, decoded now where it is not at hand; not to be written to."""
        with self._lock:
            if record in self._atoms:
                self._atoms.move_to_end(record)
                return self._atoms[record]
        atom = decode(record)
        with self._lock:
            if record not in self._atoms:
                self._atoms[record] = atom
                self.bytes += _bytes(record, atom)
            while self.bytes > self.limit:
                self.bytes -= _bytes(*self._atoms.popitem(last=False))
        return atom


def _bytes(record: Record, atom: Tensor) -> int:
    return len(record.atom) + atom.numel() * atom.element_size()
