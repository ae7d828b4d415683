"""When a document's atom has paid for itself, and what it is worth to store only those of documents that are asked for
often (the paper's section 6 and appendix D).

An atom costs one forward and half a backward pass over its document, once; RAG reads the document again in every
prompt. So the atoms of a question's documents have paid after

    questions = what the atoms cost ÷ (what RAG's answer costs − what the answer with stored atoms costs)

about the same documents, in seconds as measured and in floating-point operations as counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from regrad_loaders.baselines.key_values import KeyValueReader
from regrad_loaders.bench.figures import Figure, flops, in_turns, milliseconds
from regrad_loaders.bench.query import ANSWER_TOKENS, TOP_K, Bench
from regrad_qdrant.atoms.record import make_records

SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)  # of the documents, whose atoms are stored
DOCUMENTS = 1_000_000
EXPONENT = 1.0  # of Zipf's law: the document of rank i is retrieved as often as 1/i


def bench_crossover(
    bench: Bench, codec: str, rounds: int, on_round: Callable[[int], None] = lambda _: None
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Answers from the question alone, from passages, from their keys and values, from stored atoms and from atoms
    computed at query time, and what making the atoms takes.

    Args:
        codec: of the atoms that are made, as ingestion makes them.

    Raises:
        UnsupportedModelError: for a model whose keys can't be set to another place.
    """
    reader, reading = KeyValueReader(bench.regrad), KeyValueReader(bench.regrad)
    space, layout, sizes = bench.regrad.bank.space, bench.regrad.adapter.space.layout, list[int]()
    asked = bench.asked

    def build(turn: int) -> None:
        hits = bench.search(asked(turn), with_records=False)
        records = make_records(bench.atoms(hits), [hit.text for hit in hits], space, codec, layout)
        sizes.extend(len(record.atom) for record in records)

    def from_keys(turn: int, by: KeyValueReader, tokens: int) -> None:
        hits = bench.search(asked(turn), with_records=False)
        by.speak(bench.prompt(asked(turn), hits), tokens)

    def read_again(turn: int, tokens: int) -> None:
        reading.forget()
        from_keys(turn, reading, tokens)

    def answers(tokens: int) -> dict[str, Callable[[int], Any]]:
        """Each way to answer with so many tokens."""
        return {
            "direct": lambda turn: bench.direct(asked(turn), tokens),
            "rag": lambda turn: bench.rag(asked(turn), tokens),
            "rag-kv": lambda turn: from_keys(turn, reader, tokens),
            "rag-kv, none kept": lambda turn: read_again(turn, tokens),
            "stored": lambda turn: bench.cached(asked(turn), tokens),
            "online": lambda turn: bench.online(asked(turn), tokens),
        }

    for turn in range(rounds):  # all that will be asked for is kept
        from_keys(turn, reader, 1)
    work = answers(ANSWER_TOKENS) | {"making the atoms": build}
    operations = {name: flops(lambda party=party: party(0)) for name, party in work.items()}
    in_turns(work, 2)  # warm up
    seconds, first = in_turns(work, rounds, on_round), in_turns(answers(1), rounds)
    turns = zip(seconds["making the atoms"], seconds["rag"], seconds["stored"], strict=True)
    in_seconds = [paid_after(*turn) for turn in turns]
    in_operations = paid_after(operations["making the atoms"], operations["rag"], operations["stored"])
    figures = {
        "crossover.questions_in_seconds": Figure.of(in_seconds, "questions about the same documents"),
        "crossover.questions_in_operations": Figure.of([in_operations], "questions about the same documents"),
    }
    ms, of_atom, of_keys = milliseconds(seconds), median(sizes), median(reader.sizes)
    kept = []
    for share in SHARES:
        hits, of_as_many = head_hits(share), head_hits(share * of_atom / of_keys)
        kept.append(
            {
                "stored_share": share,
                "hits": hits,
                "megabytes": share * DOCUMENTS * of_atom / 1e6,
                "ms": ms["stored"] + (1 - hits) * (ms["online"] - ms["stored"]),
                "hits_of_keys": of_as_many,  # where as many bytes hold keys and values
                "ms_of_keys": ms["rag-kv"] + (1 - of_as_many) * (ms["rag-kv, none kept"] - ms["rag-kv"]),
            }
        )
    details = {
        "bytes_a_document": {"stored": of_atom, "rag-kv": of_keys},
        "ms": ms,
        "ms_to_first_token": milliseconds(first),
        "gflop": {name: count / 1e9 for name, count in operations.items()},
        "documents_a_question": TOP_K,
        "answer_tokens": ANSWER_TOKENS,
        "zipf": {"documents": DOCUMENTS, "exponent": EXPONENT, "kept": kept},
    }
    return figures, details


def paid_after(making: float, rag: float, stored: float) -> float:
    """Questions until what was made once is less than what RAG's prompts have cost more; infinite where they cost no
    more."""
    return making / (rag - stored) if rag > stored else math.inf


def head_hits(share: float, documents: int = DOCUMENTS, exponent: float = EXPONENT) -> float:
    """The share of all retrievals that meets the most retrieved `share` of the documents, by Zipf's law."""
    import numpy as np

    weights = np.arange(1, documents + 1, dtype=float) ** -exponent
    return float(weights[: max(1, round(share * documents))].sum() / weights.sum())
