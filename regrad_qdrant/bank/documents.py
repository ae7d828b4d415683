"""Documents as they are given to a bank, and as it finds them again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from regrad_qdrant.atoms.record import Record, text_sha
from regrad_qdrant.bank.relevance import by_rank
from regrad_qdrant.bank.stores.base import Payload, PointId
from regrad_qdrant.errors import BankError, DataError

if TYPE_CHECKING:
    from qdrant_client.models import Filter

_ID_NAMESPACE = uuid.UUID("5b1d0f3e-6f0e-5d0a-9c51-7a3f6f1c2b90")


@dataclass(frozen=True)
class Document:
    """A document to add: the id that its owner knows it by, and its payload."""

    id: str | int
    payload: Payload


def as_json(document: Document) -> Document:
    """The document with what a payload can hold: dates, UUIDs and the like as their texts, as Qdrant's client has it.

    Raises:
        BankError: for a field with something that has no JSON, such as NaN, or half of a surrogate pair.
    """
    from pydantic_core import PydanticSerializationError, to_jsonable_python

    try:
        payload = to_jsonable_python(document.payload)
        json.dumps([document.id, payload], allow_nan=False, ensure_ascii=False).encode()
        return replace(document, payload=payload)
    except (PydanticSerializationError, ValueError) as error:
        raise BankError(f"document {document.id!r}: its payload can't be written as JSON: {error}") from error


def filter_of(given: Any, name: str = "query_filter") -> Filter:
    """A filter, or one as Qdrant's REST interface has it.

    Args:
        name: what an error calls it.

    Raises:
        DataError: for anything else.
    """
    from pydantic import ValidationError
    from qdrant_client import models

    if isinstance(given, models.Filter):
        return given
    try:
        return models.Filter.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        said = [".".join(str(part) for part in first["loc"][:2]), first["msg"]]
        raise DataError(
            f"{name} is no filter of Qdrant's or its JSON, found {given!r}: {': '.join(filter(None, said))}"
        ) from error


def check_ids(ids: object) -> None:
    """Refuse one id where a list of them goes: its letters would be taken for ids.

    Raises:
        BankError: for a text.
    """
    if isinstance(ids, str):
        raise BankError(f"ids go in a list: [{ids!r}]")


def check_unicode(*texts: str) -> None:
    """Refuse a text that can't be written.

    Raises:
        DataError: for half of a surrogate pair, as an argument in another encoding than the terminal's becomes.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text {text[:40]!r} is no valid Unicode: {error}") from error


@dataclass(frozen=True)
class Hit:
    """A retrieved point. `record` is None where it has no atom of this space, or where none was asked for."""

    id: PointId
    score: float
    text: str
    payload: Payload = field(repr=False)  # without the bank's own key
    record: Record | None = field(default=None, repr=False)
    # How relevant beside the search's best document, for which it is 1; None where the order alone is known.
    relevance: float | None = None
    damaged: str | None = None  # why what stands under the bank's key is no usable record
    key: str | int | None = None  # what the layout's id field holds

    @property
    def document_id(self) -> str | int:
        """The id that the document's owner knows it by, from the layout's id field; or else the point's."""
        return self.id if self.key is None else self.key

    @property
    def stale(self) -> bool:
        """Whether the text has changed since the atom was computed."""
        return self.record is not None and self.record.sha != text_sha(self.text)


def relevances(hits: Sequence[Hit]) -> list[float]:
    """What the merge rule takes for these documents, best first: that of their ranks, where one has nothing better."""
    known = [hit.relevance for hit in hits if hit.relevance is not None]
    return known if len(known) == len(hits) else by_rank(len(hits))


def canonical_id(key: PointId | uuid.UUID) -> PointId:
    """A point id as engines return it: UUIDs with their hyphens."""
    try:
        return key if isinstance(key, int) else str(uuid.UUID(str(key)))
    except ValueError:
        return str(key)


def point_id(key: str | int) -> PointId:
    """The point id of a document: integers and UUIDs as they are, any other name hashed to a UUID."""
    if isinstance(key, int):
        return key
    try:
        return str(uuid.UUID(key))
    except ValueError:
        return str(uuid.uuid5(_ID_NAMESPACE, key))
