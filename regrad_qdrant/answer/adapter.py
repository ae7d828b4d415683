"""The adapter: φ₀ plus the update of one query on the live model, and exact restore.

    φ' = φ₀ − α ⊙ Σ wᵢ·g(dᵢ)

Every record is decoded and checked before the first weight changes. The update is written into buffers that are
allocated once; a LoRA parameter points at its buffer inside the block and at φ₀ again after it, so restoring copies
nothing and is exact on every way out.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.answer.atom_cache import AtomCache
from regrad_qdrant.atoms.record import decode_sum, finite, weighted
from regrad_qdrant.errors import AdapterError, AdapterInUseError, WrongShapeError
from regrad_qdrant.model.gradients import GradientComputer
from regrad_qdrant.model.plugin import (
    Seats,
    live_space,
    lora_layers,
    lora_weight,
    plug_in,
    row_updates,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from regrad_qdrant.atoms.record import Record
    from regrad_qdrant.model.initialization import MetaInitialization


class _Turns:
    """Whose turn it is on one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None  # the thread
        self.at_rest: Adapter | None = None  # which the owner is inside a block of φ₀ of


_HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Adapter]] = weakref.WeakKeyDictionary()  # of base models


@dataclass(frozen=True)
class RowChange:
    """What every row of a batch runs with."""

    change: dict[str, Tensor] | None  # (rows, *shape) of each tensor of the space; None: all rows alike, with none
    bare: tuple[bool, ...]  # of each row, whether it runs without the plug-in


class Adapter:
    """The plug-in of one meta-initialization on one model; one query at a time uses it.

    Outside of its blocks the model is the bare base model, bit for bit.

    Other threads wait for their turn; the same thread gets an `AdapterInUseError` instead of a deadlock.

    Args:
        model: the plain base model; it gets LoRA layers, its own weights stay as they are.
        initialization: φ₀, α and the atom space.
        check_model: compare the model's weights with those that the initialization was trained for.
        cache_bytes: of decoded atoms to keep for the next query (`AtomCache`); by default none, and a query's atoms are
            summed packed.
        beside: an adapter of the same model that goes on being used: the two take turns.

    Raises:
        WrongModelError: if they differ.
        AdapterError: if the model carries adapters of others already (one of ours is taken out), or if `beside` is one
            of another model, or was released.
    """

    def __init__(
        self,
        model: nn.Module,
        initialization: MetaInitialization,
        *,
        check_model: bool = True,
        cache_bytes: int = 0,
        beside: Adapter | None = None,
    ) -> None:

        if check_model:
            initialization.check_model(model)
        self._released = False
        holders = _HOLDERS.setdefault(model, weakref.WeakSet())
        if beside is not None and (beside not in holders or beside._released):
            raise AdapterError("beside: the adapter is of another model, or was released: give one of this model's")
        self._turns: _Turns = _Turns() if beside is None else beside._turns
        # A notebook's cell that is run again, or another bank. They go when this one is there; all have one turn.
        before = [holder for holder in holders if not holder._released] if beside is None else []
        self.initialization = initialization
        self.check_free()
        with before[0].disabled() if before else contextlib.nullcontext(), self._turns.lock:
            self.model = plug_in(model, initialization)
            self.space = live_space(self.model, initialization)
            self._parameters = {
                f"{name}.{part}": lora_weight(layer, part)
                for name, layer in lora_layers(self.model).items()
                for part in ("lora_A", "lora_B")
            }
            self._seats = Seats(self.model)
            self._seats.take_out()
        for holder in before:
            holder.release()
            holders.discard(holder)
        holders.add(self)
        self._buffers: dict[str, Tensor] = {}
        self.cache = AtomCache(cache_bytes)
        self.step_sizes = initialization.flat_step_sizes()

    def gradients(self, tokenizer: Any) -> GradientComputer:
        """What computes atoms with this model, each batch in a turn of its own."""
        return GradientComputer(self.model, tokenizer, self.space, self.initialization.max_length, self.initial)

    def check_free(self) -> None:
        """Refuse what would wait for this thread itself.

        Raises:
            AdapterInUseError: if this thread is inside a block of this model's adapters.
        """
        if self._turns.owner == threading.get_ident():
            raise AdapterInUseError("an update is applied already in this thread: leave its block before the next one")

    def release(self) -> None:
        """Take the plug-in out of the model, once the answer that is being given is done; again changes nothing."""
        if self._released:
            return
        with self._turn():
            self.model.unload()
            self._released = True

    def decode(self, records: Sequence[Record], weights: Sequence[float] | None = None) -> Tensor:
        """Σ wᵢ·g(dᵢ) of the records, (numel,) float32 on the model's device; wᵢ = 1 by default.

        Raises:
            RecordError: one of its kinds, if a record can't be used.
        """
        fingerprint, layout, device = self.initialization.fingerprint, self.space.layout, self.model.device
        if not self.cache.limit:
            return decode_sum(records, weights, fingerprint, layout, device)

        def decoded(record: Record) -> Tensor:
            return record.decode(fingerprint, layout).to(device)

        total = decode_sum([], None, fingerprint, layout, device)
        for atom, weight in [(self.cache.get(one, decoded), weight) for one, weight in weighted(records, weights)]:
            total.add_(atom, alpha=weight)
        return finite(total)

    @contextlib.contextmanager
    def applied(self, records: Sequence[Record], weights: Sequence[float] | None = None) -> Iterator[None]:
        """Inside the block the model runs with φ' of these records; after it with φ₀, bit for bit.

        Raises:
            RecordError: if a record can't be used; no weight has changed then.
            AdapterInUseError: if this thread is inside such a block already.
        """
        with self.applied_sum(self.decode(records, weights)):
            yield

    @contextlib.contextmanager
    def applied_sum(self, atom_sum: Tensor) -> Iterator[None]:
        """As `applied`, for an atom sum (numel,) that `decode` made."""
        self._check(atom_sum)
        with self._turn():
            before: list[tuple[nn.Parameter, Tensor]] = []
            try:
                for name, update in self._update(atom_sum).items():
                    parameter = self._parameters[name]
                    before.append((parameter, parameter.data))
                    parameter.data = self._written(name, parameter.data, update)
                yield
            finally:
                for parameter, initial in before:
                    parameter.data = initial

    def export(
        self,
        folder: str | Path,
        records: Sequence[Record],
        weights: Sequence[float] | None = None,
        base_model: str | None = None,
    ) -> None:
        """As `MetaInitialization.export`."""
        self.initialization.export(folder, records, weights, base_model)

    def rows(self, atom_sums: Sequence[Tensor | None], bare: Sequence[bool]) -> contextlib.AbstractContextManager[None]:
        """Inside the block row i of every batch runs with φ₀ and the update of its own atom sum (numel,), or without
        one; rows that are `bare` run as the base model. No weight is written.

        Raises:
            AdapterInUseError: if this thread is inside such a block already.
        """
        return self.changed(self.row_change(atom_sums, bare))

    def row_change(self, atom_sums: Sequence[Tensor | None], bare: Sequence[bool]) -> RowChange:
        """What `rows` changes, for `changed`: once for many passes of the same rows."""
        import torch

        for atom_sum in atom_sums:
            if atom_sum is not None:
                self._check(atom_sum)
        given = [atom_sum for atom_sum in atom_sums if atom_sum is not None]
        if all(bare) or (not given and not any(bare)):
            return RowChange(None, tuple(bare))
        zeros = torch.zeros_like(given[0]) if given else torch.zeros(self.space.numel)
        sums = torch.stack([zeros if atom_sum is None else atom_sum for atom_sum in atom_sums])
        return RowChange(self._change(sums), tuple(bare))

    @contextlib.contextmanager
    def changed(self, rows: RowChange) -> Iterator[None]:
        """The block of `rows`."""
        if rows.change is None:
            with self.disabled() if all(rows.bare) else self.initial():
                yield
            return
        with self._turn(), row_updates(self.model, self.space, rows.change, rows.bare):
            yield

    @contextlib.contextmanager
    def initial(self) -> Iterator[None]:
        """Inside the block the model runs with φ₀ and no atoms. One inside another in the same thread is no more."""
        if self._turns.owner == threading.get_ident() and self._turns.at_rest is self:
            yield
            return
        with self._turn():
            self._turns.at_rest = self
            try:
                yield
            finally:
                self._turns.at_rest = None

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model is the bare base model, as it is outside of all blocks; no other one begins."""
        with self._turn(plugged=False):
            yield

    def _check(self, atom_sum: Tensor) -> None:
        if atom_sum.shape != (self.space.numel,):
            raise WrongShapeError(f"an atom sum of shape {tuple(atom_sum.shape)}, expected ({self.space.numel},)")

    def _change(self, sums: Tensor) -> dict[str, Tensor]:
        """−α ⊙ sums (…, numel) as the space's tensors."""
        like = next(iter(self._parameters.values()))
        change = (-self.step_sizes.to(sums.device) * sums).to(device=like.device, dtype=like.dtype)
        return self.space.unflatten(change)

    def _update(self, atom_sum: Tensor) -> dict[str, Tensor]:
        """The change of the LoRA tensors, −α ⊙ sum mapped back by the space."""
        return self.space.to_update(self._change(atom_sum))

    def _written(self, name: str, initial: Tensor, update: Tensor) -> Tensor:
        """φ₀ + update in the tensor's buffer, which is made anew only where the model has moved."""
        import torch

        buffer = self._buffers.get(name)
        if buffer is None or buffer.device != initial.device or buffer.dtype != initial.dtype:
            with torch.inference_mode(False):  # the buffer outlives a caller's inference mode
                buffer = self._buffers[name] = torch.empty_like(initial)
        with torch.no_grad():
            return torch.add(initial, update.to(initial.device), out=buffer)

    @contextlib.contextmanager
    def _turn(self, *, plugged: bool = True) -> Iterator[None]:
        self.check_free()
        turns = self._turns
        with turns.lock:
            if self._released:
                raise AdapterError(
                    "the model was taken over by another ReGrad, or given back by close(): make a new one (with "
                    "beside=OTHER, where both are to be used)"
                )
            try:
                turns.owner = threading.get_ident()
                if plugged:
                    self._seats.put_in()
                yield
            finally:
                self._seats.take_out()
                turns.owner = None
