"""Retrievable gradients for teams that already run Qdrant (ReGrad, arXiv 2606.15734).

    from regrad_qdrant import GradientBank, MetaInitialization, ReGrad, load_base_model

    initialization = MetaInitialization.load("smollm2-135m-instruct")
    model, tokenizer = load_base_model(initialization.base.name)
    bank = GradientBank.open("./regrad_bank", "docs", initialization.fingerprint)
    print(ReGrad(model, tokenizer, bank, initialization).answer("Where was Ida Corvandine born?").text)

Importing this package is cheap: torch, transformers and qdrant-client are imported when first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrad_qdrant.answer.adapter import Adapter
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.answer.query import Answer, Query
    from regrad_qdrant.atoms.merge import MergeRule
    from regrad_qdrant.atoms.record import Record
    from regrad_qdrant.bank.async_bank import AsyncGradientBank
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.documents import Document, Hit
    from regrad_qdrant.bank.embed import Bm25, DenseEmbedder
    from regrad_qdrant.bank.layouts import Layout
    from regrad_qdrant.errors import RegradError
    from regrad_qdrant.model.base_model import load_base_model
    from regrad_qdrant.model.gradients import GradientComputer
    from regrad_qdrant.model.initialization import MetaInitialization
    from regrad_qdrant.model.prompts import Prompt, PromptFormat

__version__ = "0.1.0"

_MODULES = {
    "Adapter": "answer.adapter",
    "Answer": "answer.query",
    "AsyncGradientBank": "bank.async_bank",
    "Bm25": "bank.embed",
    "DenseEmbedder": "bank.embed",
    "Document": "bank.documents",
    "GradientBank": "bank.bank",
    "GradientComputer": "model.gradients",
    "Hit": "bank.documents",
    "Layout": "bank.layouts",
    "MergeRule": "atoms.merge",
    "MetaInitialization": "model.initialization",
    "Prompt": "model.prompts",
    "PromptFormat": "model.prompts",
    "Query": "answer.query",
    "ReGrad": "answer.pipeline",
    "Record": "atoms.record",
    "RegradError": "errors",
    "load_base_model": "model.base_model",
}

__all__ = [
    "Adapter",
    "Answer",
    "AsyncGradientBank",
    "Bm25",
    "DenseEmbedder",
    "Document",
    "GradientBank",
    "GradientComputer",
    "Hit",
    "Layout",
    "MergeRule",
    "MetaInitialization",
    "Prompt",
    "PromptFormat",
    "Query",
    "ReGrad",
    "Record",
    "RegradError",
    "load_base_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
