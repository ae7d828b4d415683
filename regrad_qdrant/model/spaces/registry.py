"""The registry of atom spaces: a name each."""

from __future__ import annotations

from regrad_qdrant.model.space import AtomSpace
from regrad_qdrant.model.spaces.core import CoreSpace, TiedSpace
from regrad_qdrant.model.spaces.lora import LoraSpace
from regrad_qdrant.model.spaces.values import ValueSpace

SPACES: dict[str, type[AtomSpace]] = {space.kind: space for space in (LoraSpace, CoreSpace, TiedSpace, ValueSpace)}
