"""Where a collection keeps its text and the atoms of one space, what makes its vectors, and what ingestion noted of
all that in the metadata.

`collection` says which points have an atom there.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.bank.embed import Bm25, Embedder, embedder_of, noted
from regrad_qdrant.bank.layouts import CORPUS, SUSPECTS, Layout, detect, json_path
from regrad_qdrant.bank.stores.base import (
    MAX_REQUEST_BYTES,
    Configuration,
    Store,
    StoredPoint,
    VectorNames,
    Without,
    check_name,
    is_empty,
)
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.errors import BankError, UnindexedFilterError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    from regrad_qdrant.model.space import AtomSpace

SAMPLE = 64  # points that show the layout
LOOKED_THROUGH = 100_000  # points up to which all are looked through for a field of the bank's own name
MADE = "regrad-qdrant"  # the metadata's key for what a collection is like that a bank has made, whatever its spaces
OF_SIDECAR = ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")  # as documents have


class AtomPlace:
    """Where a collection keeps its text and the atoms of one space; arguments as those of `GradientBank`."""

    def __init__(
        self,
        client: QdrantClient | Store,
        collection_name: str,
        space: str,
        *,
        payload_key: str = DEFAULT_KEY,
        layout: Layout | None = None,
        embedders: Mapping[str, Embedder] | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        sidecar: str | Literal[False] | None = None,
    ) -> None:
        if inspect.iscoroutinefunction(getattr(client, "query_points", None)):
            raise BankError("an AsyncQdrantClient goes into an AsyncGradientBank, whose methods are awaited")
        self.store: Store = ClientStore(client, collection_name) if hasattr(client, "query_points") else client  # type: ignore[arg-type,assignment] # told apart by the client's own method
        self._atoms: Store | None = None
        self._looked: float | None = None  # when the metadata was asked for a sidecar, of a bank that was told of none
        if sidecar is not None:
            self.keep_atoms_in(sidecar or None)
        self.space = space
        if not payload_key or json_path([payload_key]) != payload_key or payload_key in ("id", *SUSPECTS):
            raise BankError(
                f"payload key {payload_key!r}: needs a name of letters, digits, _ and - that no document has, "
                f"so none of id, {', '.join(SUSPECTS)}"
            )
        self.payload_key = payload_key
        self._layout: Layout | None = None
        if layout is not None:
            self._use(layout)
        self._embedders = None if embedders is None else dict(embedders)
        self.max_request_bytes = max_request_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; an embedded shard can then be opened by another process."""
        self.store.close()
        if self._atoms is not None and self._atoms is not self.store:
            self._atoms.close()

    @property
    def atoms(self) -> Store:
        """Where the atoms are: the documents' own collection, or the sidecar that was given or that ingestion noted."""
        if self._atoms is None:
            if not self.store.exists():
                return self.store  # until there is something to see
            self.keep_atoms_in(self._entry(self.store).get("sidecar"))
            self._looked = time.monotonic()
        assert self._atoms is not None
        return self._atoms

    def keep_atoms_in(self, sidecar: str | None) -> None:
        """Read and write atoms in the collection of this name beside the documents', or in place.

        Raises:
            BankError: if it is the documents' own, or no name of a collection.
        """
        if sidecar == self.store.name:
            raise BankError(f"the sidecar {sidecar!r} is the documents' own collection: give it another name")
        if sidecar is not None:
            check_name(sidecar)
        self._atoms = self.store if sidecar is None else self.store.sibling(sidecar)
        self._looked = None

    @property
    def in_sidecar(self) -> bool:
        """Whether the atoms have a collection of their own."""
        return self.atoms is not self.store

    @property
    def layout(self) -> Layout:
        """Where payloads keep the text: as given, as the metadata notes it, or as the first points show.

        Raises:
            BankError: if it can't be told; the error lists the candidates.
        """
        if self._layout is None:
            if not self.store.exists():
                return CORPUS  # until there is something to see
            noted = self.known("layout")
            if noted is None:
                return self.detect_layout()
            try:
                self._use(Layout(**noted))
            except TypeError as error:
                raise BankError(
                    f"the collection notes a layout {noted} under {self.metadata_key!r} of its metadata: a newer "
                    "regrad-qdrant may know it; or name the field with the text (--text-path PATH, in Python "
                    "layout=Layout('mine', 'PATH'))"
                ) from error
        assert self._layout is not None
        return self._layout

    def detect_layout(self) -> Layout:
        """Find out where the collection's payloads keep the text, from its first points, and read it there.

        Raises:
            BankError: if it can't be told; the error lists the candidates.
        """
        points, _ = self.store.scroll(None, SAMPLE, None, Without((self.payload_key,)))
        found = detect([point.payload for point in points])
        if points:
            self._use(found)
        return found

    def name_documents_by(self, path: str) -> None:
        """Take the documents' own ids from another field than the layout's."""
        self._use(replace(self.layout, id=path))

    @property
    def embedders(self) -> dict[str, Embedder]:
        """What makes each named vector from text."""
        if self._embedders is None:
            if not self.store.exists():
                return {"bm25": Bm25()}  # until there is something to look at
            found = {name: embedder_of(spec) for name, spec in (self.known("embedders") or {}).items()}
            self._embedders = found or {"bm25": Bm25()}
        return self._embedders

    def _specs(self) -> dict[str, Any]:
        """What the metadata can say of each vector's embedder."""
        return {name: found for name, embedder in self.embedders.items() if (found := noted(embedder)) is not None}

    def embed_with(self, name: str, embedder: Embedder) -> None:
        """Make one vector from text by this embedder, the others as before."""
        self._embedders = self.embedders | {name: embedder}

    def _use(self, layout: Layout) -> None:
        own = [*layout.fields(), "id"]
        if self.payload_key in own:
            raise BankError(f"payload key {self.payload_key!r}: the layout {layout} reads {own}; choose another key")
        self._layout = layout

    def noted(self) -> dict[str, Any]:
        """What ingestion wrote down about this space in the collection's metadata; nothing where there is none."""
        if self.in_sidecar and not self.atoms.exists():
            return {}
        return self._entry(self.atoms)

    def known(self, what: str) -> Any:
        """What the metadata says of the layout, or of the embedders: as ingestion noted it of this space, as the bank
        that made the collection did, or as ingestion noted it of another space; None where nothing does."""
        if found := self.noted().get(what):
            return found
        metadata = _entries(self.store)
        places = itertools.chain((metadata,), map(_entries, self._sidecars()))
        others = (entry for of_place in places for entry in of_place.values() if "shapes" in entry)
        entries = itertools.chain((metadata.get(MADE, {}),), others)
        return next((found for entry in entries if (found := entry.get(what))), None)

    def _sidecars(self) -> Iterator[Store]:
        """The sidecars that the documents' metadata names, of any space, as far as they are there."""
        for name in sidecars_of(self.store):
            if (sidecar := self.store.sibling(name)).exists():
                yield sidecar

    def _entry(self, store: Store) -> dict[str, Any]:
        """What stands about this space in the metadata of the documents' collection, or of the sidecar."""
        return _entries(store).get(self.metadata_key, {})

    @property
    def metadata_key(self) -> str:
        """The key of the collection's metadata under which ingestion notes what it did."""
        return f"{self.payload_key}.{self.space}"

    @property
    def space_path(self) -> str:
        """Where a point says which space its atom is of."""
        return f"{self.payload_key}.space"

    def notes_other_spaces(self) -> bool:
        """Whether ingestion noted another space whose atoms are in the documents' own points under the bank's key."""
        return any(
            key.startswith(f"{self.payload_key}.") and key != self.metadata_key and "sidecar" not in entry
            for key, entry in _entries(self.store).items()
        )

    def look_again(self, after: float = 0.0) -> bool:
        """Find where an ingestion keeps the atoms that came after this bank was opened, or an alias was switched,
        unless it was looked for within so many seconds; whether that is elsewhere."""
        if self._looked is None or time.monotonic() - self._looked < after or not self.store.exists():
            return False
        sidecar = self._entry(self.store).get("sidecar")
        if moved := sidecar != (self.atoms.name if self.in_sidecar else None):
            self.keep_atoms_in(sidecar)
        self._looked = time.monotonic()
        return moved

    def index(self) -> None:
        """Index `<key>.space`, which `missing` and `stale` filter on, and make the sidecar, on as many shards and
        replicas as the documents have. Again changes nothing.

        Raises:
            BankError: as `check_place`, before anything is changed.
        """
        self.check_place()
        if self.in_sidecar and not self.atoms.exists():
            kept = {name: value for name, value in self.store.configuration().settings.items() if name in OF_SIDECAR}
            self.atoms.create_as(Configuration(VectorNames(), {"vectors_config": {}, **kept}))
        self.atoms.create_keyword_index(self.space_path)

    def check_place(self) -> None:
        """Refuse to write atoms where something else stands, before anything is written.

        Before the first ingestion under the bank's key every point of a collection is looked at up to 100,000; of a
        larger one, and where strict mode refuses the filter, the first ones. After it the key is the bank's, and what
        is no atom is damage.

        Raises:
            BankError: if points have a field of the bank's name that is no atom, if the sidecar is a collection with
                vectors, or if the server distributes the points by shard keys of the user's, which a write must name.
        """
        if self.in_sidecar and self.atoms.exists() and (vectors := self.atoms.vectors()).names:
            raise BankError(
                f"collection {self.atoms.name!r} has vectors ({', '.join(vectors.names)}), so it is no sidecar: choose "
                "a name that no collection has (--sidecar NAME)"
            )
        if not self.atoms.exists():
            return
        if self.atoms.has_shard_keys:
            raise BankError(
                f"collection {self.atoms.name!r} is sharded by keys of its own, which every write would have to name: "
                "keep the atoms in a sidecar (--sidecar NAME)"
            )
        noted = self.noted()
        key_is_ours = (noted and "sidecar" not in noted) or self.notes_other_spaces()
        if not key_is_ours and (foreign := self._foreign()):
            raise BankError(
                f"point {foreign[0].id!r} has a field {self.payload_key!r} that is no atom, and it would be written "
                "over: choose another key (--payload-key NAME)"
            )

    def _foreign(self) -> list[StoredPoint]:
        """Points that have something else than an atom under the bank's key."""
        from qdrant_client import models

        if self.atoms.count() <= LOOKED_THROUGH:
            theirs = models.Filter(must=[is_empty(self.space_path)], must_not=[is_empty(self.payload_key)])
            with contextlib.suppress(UnindexedFilterError):
                return self.atoms.scroll(theirs, 1, None, False)[0]
        first, _ = self.atoms.scroll(None, SAMPLE, None, [self.payload_key])
        values = [(point, point.payload.get(self.payload_key)) for point in first]
        return [p for p, v in values if v not in (None, []) and not (isinstance(v, Mapping) and "space" in v)]

    def describe(self, space: AtomSpace, embedders: Mapping[str, Any] | None = None) -> None:
        """Note in the collection's metadata what readers need to know (Qdrant 1.16 and later; older ones ignore it):
        the shapes of the space's tensors, the layout, and what embeds each vector. With a sidecar all of it stands
        there, and its name in the documents' collection.

        Args:
            embedders: by the vector's name, what `Embedder.noted` says; by itself of the bank's own.
        """
        noted = {
            "space": space.kind,
            "shapes": {name: list(shape) for name, shape in space.shapes.items()},
            "layout": self.layout.noted(),
            "embedders": dict(embedders or self._specs()),
        }
        noted = {name: value for name, value in noted.items() if value is not None}
        if self.noted() != noted:
            self.atoms.write_metadata({self.metadata_key: noted})
        if self.in_sidecar:
            self.note_sidecar()

    def note_sidecar(self) -> bool:
        """Note in the documents' collection where the atoms are; False where the server keeps no metadata."""
        found = {"sidecar": self.atoms.name}
        if self._entry(self.store) != found:
            self.store.write_metadata({self.metadata_key: found})
        return self._entry(self.store) == found

    def forget(self) -> None:
        """Take away what ingestion noted of this space, where its atoms are and where they are looked up."""
        for store in (self.store, self.atoms) if self.in_sidecar else (self.store,):
            entry = self._entry(store)
            if entry and (self.in_sidecar or "sidecar" not in entry):  # which leads to atoms that are elsewhere
                store.write_metadata({self.metadata_key: None})

    def optimize(self) -> None:
        """Let an embedded engine put its segments in order, after a bulk load; a server does so by itself."""
        self.store.optimize()
        if self.in_sidecar:
            self.atoms.optimize()


def sidecars_of(store: Store) -> list[str]:
    """The names of the sidecars to which a collection's metadata leads, of any space."""
    return sorted({str(entry["sidecar"]) for entry in _entries(store).values() if "sidecar" in entry})


def _entries(store: Store) -> dict[str, dict[str, Any]]:
    """What stands in a collection's metadata, key by key, as far as it can be of ours."""
    return {key: dict(entry) for key, entry in store.read_metadata().items() if isinstance(entry, Mapping)}
