"""A bank of the options that commands and servers have in common: names of models, vectors and fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.embed import Bm25, DenseEmbedder, Embedder
from regrad_qdrant.bank.layouts import CORPUS, Layout

if TYPE_CHECKING:
    from regrad_qdrant.bank.stores.base import Store


def assembled(
    store: Store,
    space: str,
    *,
    payload_key: str,
    dense: str | None = None,
    text_path: str | None = None,
    using: Sequence[str] | None = None,
    sidecar: str | Literal[False] | None = None,
    language: str | None = None,
) -> GradientBank:
    """The bank of a collection.

    Args:
        dense: sentence-transformers model of the vector that `using` names beside bm25, or else of one named dense.
        text_path: where payloads keep the text; None: as noted, or as the first points show.
        language: of BM25's words; without it and `dense` the embedders are those that ingestion noted.
    """
    embedders: dict[str, Embedder] | None = None
    if language is not None:
        embedders = {"bm25": Bm25(language)}
    if dense is not None:
        embedders = {
            "bm25": Bm25(language or "english"),
            next((name for name in using or () if name != "bm25"), "dense"): DenseEmbedder(dense),
        }
    layout = None if text_path is None else CORPUS if text_path == CORPUS.text else Layout("given", text_path)
    return GradientBank(
        store, store.name, space, payload_key=payload_key, layout=layout, embedders=embedders, sidecar=sidecar
    )
