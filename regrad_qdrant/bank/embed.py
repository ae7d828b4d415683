"""Query and document vectors: BM25 by Qdrant's own tokenizer, dense by any sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from regrad_qdrant.bank.stores.base import SparseVector, Vector
from regrad_qdrant.errors import BankError
from regrad_qdrant.model.base_model import resolve_package

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Embedder(Protocol):
    """Makes the vectors of one named vector of a collection."""

    @property
    def size(self) -> int | None:
        """The length of a dense vector; None for sparse ones."""

    def documents(self, texts: Sequence[str]) -> list[Vector]: ...

    def query(self, text: str) -> Vector: ...


class Bm25:
    """The sparse vectors of the server's BM25 inference (`qdrant/bm25`), computed here, with no model.

    The collection's sparse vector needs the IDF modifier.
    """

    size = None

    @cached_property
    def _model(self) -> Any:
        import qdrant_edge

        return qdrant_edge.Bm25()

    def documents(self, texts: Sequence[str]) -> list[Vector]:
        return [self._sparse(self._model.embed_document(text)) for text in texts]

    def query(self, text: str) -> Vector:
        return self._sparse(self._model.embed_query(text))

    @staticmethod
    def _sparse(vector: Any) -> SparseVector:
        return SparseVector(list(vector.indices), list(vector.values))


class DenseEmbedder:
    """Dense vectors by a sentence-transformers model (extra `dense`): its name, its folder, or
    `package:<import name>/<folder>` for one that an installed package carries.
    """

    def __init__(self, model: str) -> None:
        self.name = model

    @cached_property
    def _model(self) -> SentenceTransformer:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise BankError("dense vectors need sentence-transformers: pip install 'regrad-qdrant[dense]'") from error
        try:
            return SentenceTransformer(resolve_package(self.name))
        except (OSError, ValueError) as error:
            raise BankError(f"can't load the sentence-transformers model {self.name!r}: {error}") from error

    @property
    def size(self) -> int | None:
        return self._model.get_embedding_dimension()

    def documents(self, texts: Sequence[str]) -> list[Vector]:
        return [vector.tolist() for vector in self._model.encode_document(list(texts), show_progress_bar=False)]

    def query(self, text: str) -> Vector:
        vector: list[float] = self._model.encode_query(text, show_progress_bar=False).tolist()
        return vector
