"""A share of a collection's points, by the hash of their ids: work for one of several processes that know no other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_qdrant.bank.stores.base import PointId


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of all points that are about as large; it holds a point whatever else is added.

    Args:
        index: which, from 0.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise DataError(f"a shard is I/N with I from 0 to N-1, found {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard of a text I/N.

        Raises:
            DataError: for any other text.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise DataError(f"a shard is I/N with I from 0 to N-1, such as 3/64, found {text!r}")
        return cls(int(index), int(count))

    def has(self, point_id: PointId) -> bool:
        digest = hashlib.sha256(str(point_id).lower().encode()).digest()
        return int.from_bytes(digest[:8]) % self.count == self.index
