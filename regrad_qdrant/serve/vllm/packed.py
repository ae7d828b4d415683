"""An update on its way to vLLM's worker: a query's atoms, still packed, and their shares, in the path of a LoRA.

What a path of vLLM's names it may have to load again at any time, after the adapter was evicted: so the path carries
everything. Of three documents that is 23 KB; the merged adapter's tensors would be megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.record import Record
from regrad_qdrant.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_qdrant.model.initialization import MetaInitialization

SCHEME = "regrad:"


@dataclass(frozen=True)
class PackedUpdate:
    """Σ sharesᵢ·g(recordsᵢ) of one space, not summed yet; no records: φ₀ alone."""

    space: str
    records: Sequence[Record]
    shares: Sequence[float]

    @property
    def path(self) -> str:
        """Everything as the path of a LoRA."""
        atoms = [[record.codec, record.atom] for record in self.records]
        return SCHEME + json.dumps({"space": self.space, "atoms": atoms, "shares": list(self.shares)})

    @classmethod
    def read(cls, path: str) -> PackedUpdate:
        """The update of such a path.

        Raises:
            RecordError: if it is none.
        """
        try:
            found = json.loads(path.removeprefix(SCHEME))
            space, shares = str(found["space"]), [float(share) for share in found["shares"]]
            records = [Record(space, "", str(codec), str(atom)) for codec, atom in found["atoms"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"a LoRA's path {path[:40]!r} … holds no update: {error!r}") from error
        return cls(space, records, shares)

    def tensors(self, initialization: MetaInitialization) -> dict[str, Tensor]:
        """The merged adapter's tensors, new ones every time: vLLM scales them in place.

        Raises:
            RecordError: if a record can't be used.
        """
        return initialization.adapter_tensors(self.records, self.shares)
