"""A bank of the options that commands and servers have in common: names of models, vectors and fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.embed import Bm25, DenseEmbedder
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
        language: of BM25's words. What neither it nor `dense` names is embedded as the collection notes it.
    """
    layout = None if text_path is None else CORPUS if text_path == CORPUS.text else Layout("given", text_path)
    bank = GradientBank(store, store.name, space, payload_key=payload_key, layout=layout, sidecar=sidecar)
    if language is not None:
        bank.embed_with("bm25", Bm25(language))
    if dense is not None:
        bank.embed_with(next((name for name in using or () if name != "bm25"), "dense"), DenseEmbedder(dense))
    return bank
