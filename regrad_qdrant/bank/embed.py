"""Query and document vectors: BM25 by Qdrant's own tokenizer, dense by any sentence-transformers model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from regrad_qdrant.bank.stores.base import SparseVector, Vector
from regrad_qdrant.errors import BankError
from regrad_qdrant.model.base_model import resolve_package

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


_LOADING = threading.RLock()

WITHOUT_SPACES = ("chinese", "japanese", "korean", "thai")  # languages whose words are found by a model


class Embedder(Protocol):
    """Makes the vectors of one named vector of a collection."""

    @property
    def size(self) -> int | None:
        """The length of a dense vector; None for sparse ones."""

    def documents(self, texts: Sequence[str]) -> list[Vector]: ...

    def query(self, text: str) -> Vector: ...


def noted(embedder: Embedder) -> dict[str, Any] | None:
    """What `embedder_of` makes such an embedder of; None for one of a user's own."""
    found: dict[str, Any] | None = getattr(embedder, "noted", lambda: None)()
    return found


def embedder_of(noted: Mapping[str, Any]) -> Embedder:
    """The embedder that a collection's metadata names.

    Raises:
        BankError: for a kind that this version does not know.
    """
    kinds: dict[str, Callable[..., Embedder]] = {"bm25": Bm25, "sentence-transformers": DenseEmbedder}
    try:
        return kinds[noted["kind"]](**{name: value for name, value in noted.items() if name != "kind"})
    except (KeyError, TypeError) as error:
        raise BankError(
            f"the collection notes an embedder {dict(noted)} in its metadata: a newer regrad-qdrant may know it"
        ) from error


class _LoadedOnce:
    """Its model is loaded at the first use, and once though threads come for it together."""

    @property
    def _model(self) -> Any:
        if "_loaded" in vars(self):
            return self._loaded
        with _LOADING:
            return self._loaded

    @cached_property
    def _loaded(self) -> Any:
        raise NotImplementedError


class Bm25(_LoadedOnce):
    """The sparse vectors of the server's BM25 inference (`qdrant/bm25`), computed here, with no model.

    The collection's sparse vector needs the IDF modifier.

    Args:
        language: of stemming and stop words, as Qdrant names it.
    """

    size = None

    def __init__(self, language: str = "english") -> None:
        self.language = language

    def noted(self) -> dict[str, Any]:
        return {"kind": "bm25", "language": self.language}

    @cached_property
    def _loaded(self) -> Any:
        import qdrant_edge as edge

        tokenizer = edge.TokenizerType.Multilingual if self.language in WITHOUT_SPACES else None
        try:
            return edge.Bm25(edge.Bm25Config(language=self.language, tokenizer=tokenizer))
        except Exception as error:  # qdrant_edge has no exception type of its own
            raise BankError(f"BM25 in the language {self.language!r}: {error}") from error

    def documents(self, texts: Sequence[str]) -> list[Vector]:
        return [self._sparse(self._model.embed_document(text)) for text in texts]

    def query(self, text: str) -> Vector:
        return self._sparse(self._model.embed_query(text))

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """BM25 of a question against a few texts, their own rarity of words counted over these texts alone."""
        words = self._model.embed_query(query)
        rows = [dict(zip(row.indices, row.values, strict=True)) for row in map(self._model.embed_document, texts)]
        total = [0.0] * len(texts)
        for word in words.indices:
            having = sum(word in row for row in rows)
            rarity = math.log(1 + (len(rows) - having + 0.5) / (having + 0.5))
            total = [score + rarity * row.get(word, 0.0) for score, row in zip(total, rows, strict=True)]
        return total

    @staticmethod
    def _sparse(vector: Any) -> SparseVector:
        return SparseVector(list(vector.indices), list(vector.values))


class DenseEmbedder(_LoadedOnce):
    """Dense vectors by a sentence-transformers model (extra `dense`): its name, its folder, or
    `package:<import name>/<folder>` for one that an installed package carries.
    """

    def __init__(self, model: str) -> None:
        self.name = model

    def noted(self) -> dict[str, Any]:
        return {"kind": "sentence-transformers", "model": self.name}

    @cached_property
    def _loaded(self) -> SentenceTransformer:
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
        size: int | None = self._model.get_embedding_dimension()
        return size

    def documents(self, texts: Sequence[str]) -> list[Vector]:
        return [vector.tolist() for vector in self._model.encode_document(list(texts), show_progress_bar=False)]

    def query(self, text: str) -> Vector:
        vector: list[float] = self._model.encode_query(text, show_progress_bar=False).tolist()
        return vector
