"""Spans of texts as a grammar of llguidance's, which vLLM takes as a structured output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrad_qdrant.answer.query import Source

if TYPE_CHECKING:
    from regrad_qdrant.bank.documents import Hit

SOME_WORD = r"/(?s:.*\w.*)/"


def grammar_of(texts: Sequence[str]) -> str | None:
    """Whole words of one of the texts that follow each other there, with white space as one blank; None where no text
    has a word."""
    flat = [words for text in texts if re.search(r"\w", words := " ".join(text.split()))]
    if not flat:
        return None
    rules = [f"T{i}: %regex {json.dumps({'substring_words': text})}" for i, text in enumerate(flat)]
    either = " | ".join(f"T{i}" for i in range(len(flat)))
    return "\n".join(["start: SPAN", f"SPAN: ({either}) & {SOME_WORD}", *rules])


def source_of(said: str, hits: Sequence[Hit]) -> Source | None:
    """Where an answer stands: in the first of the documents that has it."""
    span = re.compile(r"\s+".join(map(re.escape, said.split())))
    for hit in hits:
        if said.strip() and (found := span.search(hit.text)):
            return Source(hit.document_id, *found.span())
    return None
