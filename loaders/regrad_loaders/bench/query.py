"""What one answer costs, and a batch of them: ReGrad beside the bare model and beside RAG, with the same passages.

Every answer is made to have the same number of tokens, so that a mode that says little does not look fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from regrad_loaders.bench.figures import Figure, finish, flops, in_turns, milliseconds
from regrad_loaders.bench.gradients import Floor
from regrad_loaders.data.folders import Question
from regrad_qdrant.answer.generation import encoded
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.bank.documents import Hit, relevances
from regrad_qdrant.model.head import own_states
from regrad_qdrant.model.prompts import Prompt

ANSWER_TOKENS = 20
TOP_K = 3


@dataclass
class Bench:
    """The parties: one model with its plug-in and bank, and the same model bare.

    Args:
        regrad: with on_missing="compute".
        bare: another copy of the base model, without plug-in.
        questions: asked in turn; retrieval finds passages for each.
    """

    regrad: ReGrad
    bare: Any
    questions: Sequence[Question]

    def asked(self, turn: int) -> Question:
        """The question of a round."""
        return self.questions[turn % len(self.questions)]

    def prompt(self, question: Question, hits: Sequence[Hit] = ()) -> Prompt:
        return Prompt(question.question, question.kind, question.choices, tuple(hit.text for hit in hits))

    def speak(self, model: Any, prompts: Sequence[Prompt], tokens: int) -> Tensor:
        """Exactly so many tokens for every prompt, greedily: (prompts, tokens)."""
        from transformers import GenerationConfig

        tokenizer = self.regrad.tokenizer
        ids, mask = encoded(model, tokenizer, prompts)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        with torch.inference_mode(), own_states(model):
            said: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return said[:, ids.shape[1] :]

    def search(self, question: Question, *, with_records: bool) -> list[Hit]:
        return self.regrad.bank.search(question.question, TOP_K, with_records=with_records)

    def direct(self, question: Question, tokens: int) -> None:
        self.speak(self.bare, [self.prompt(question)], tokens)

    def rag(self, question: Question, tokens: int) -> None:
        self.speak(self.bare, [self.prompt(question, self.search(question, with_records=False))], tokens)

    def cached(self, question: Question, tokens: int) -> dict[str, float]:
        """Seconds of each part."""
        times = {"start": time.perf_counter()}
        hits = self.search(question, with_records=True)
        times["search"] = time.perf_counter()
        atom_sum = self.sum(hits)
        times["decode"] = time.perf_counter()
        with self.regrad.adapter.applied_sum(atom_sum):
            times["apply"] = time.perf_counter()
            self.speak(self.regrad.adapter.model, [self.prompt(question)], tokens)
            times["generate"] = time.perf_counter()
        times["restore"] = time.perf_counter()
        names = list(times)
        return {name: times[name] - times[before] for before, name in zip(names, names[1:], strict=False)}

    def online(self, question: Question, tokens: int) -> None:
        """The gradients of the retrieved passages, all in one pass, and the answer with them."""
        hits = self.search(question, with_records=False)
        atoms = self.atoms(hits)
        weights = torch.tensor(self.regrad.weighing.merge.weights(relevances(hits)), device=atoms.device)
        with self.regrad.adapter.applied_sum(weights @ atoms):
            self.speak(self.regrad.adapter.model, [self.prompt(question)], tokens)

    def floor_of_gradients(self, question: Question) -> None:
        """What the gradients of the passages can't do without (`bench_gradients.Floor`)."""
        hits = self.search(question, with_records=False)
        Floor(self.bare, self.regrad.initialization.layers[0]).run(
            [self.regrad.gradients.encode(hit.text) for hit in hits]
        )

    def atoms(self, hits: Sequence[Hit]) -> Tensor:
        """The gradients (documents, numel) of retrieved documents, all in one pass."""
        documents = [self.regrad.gradients.encode(hit.text) for hit in hits]
        with self.regrad.adapter.initial():
            return self.regrad.gradients.atoms(documents)

    def sum(self, hits: Sequence[Hit]) -> Tensor:
        """Σ wᵢ·g(dᵢ) of retrieved documents."""
        weights = self.regrad.weighing.merge.weights(relevances(hits))
        return self.regrad.adapter.decode([hit.record for hit in hits if hit.record], weights)


def bench_query(
    bench: Bench, rounds: int, on_round: Callable[[int], None] = lambda _: None
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """One question after another through every mode."""
    parts: list[dict[str, float]] = []
    asked = bench.asked

    def whole(turn: int) -> None:
        parts.append(bench.cached(asked(turn), ANSWER_TOKENS))

    work: dict[str, Callable[[int], Any]] = {
        "direct": lambda turn: bench.direct(asked(turn), ANSWER_TOKENS),
        "rag": lambda turn: bench.rag(asked(turn), ANSWER_TOKENS),
        "regrad": whole,
        "online": lambda turn: bench.online(asked(turn), ANSWER_TOKENS),
        "gradients' floor": lambda turn: bench.floor_of_gradients(asked(turn)),
        "first token, direct": lambda turn: bench.direct(asked(turn), 1),
        "first token, rag": lambda turn: bench.rag(asked(turn), 1),
        "first token, regrad": lambda turn: bench.cached(asked(turn), 1),
    }
    gflop = {name: flops(lambda party=party: party(0)) / 1e9 for name, party in work.items()}
    in_turns(work, 2)  # warm up
    parts.clear()
    seconds = in_turns(work, rounds, on_round)
    own = [1 - part["generate"] / sum(part.values()) for part in parts]
    floor_of_rag = median(d / r for d, r in zip(seconds["direct"], seconds["rag"], strict=True))
    first = median(d / r for d, r in zip(seconds["first token, direct"], seconds["first token, rag"], strict=True))
    space = bench.regrad.adapter.space
    moved = sum(4 * tensor.numel() for tensor in space.to_update(space.unflatten(torch.zeros(space.numel))).values())
    figures = {
        "query.own_share": Figure.of(
            own, "of the whole answer", _copy_seconds(moved, bench.bare.device) / median(seconds["regrad"]),
            f"reading and writing {2 * moved / 1e6:.0f} MB of plug-in tensors once",
        ),
        "query.regrad_over_direct": Figure.ratio(
            seconds["regrad"], seconds["direct"], 1.0, "the bare model's answer without any plug-in"
        ),
        "query.regrad_over_rag": Figure.ratio(
            seconds["regrad"], seconds["rag"], floor_of_rag, "the bare model's answer to the question alone"
        ),
        "query.first_token_over_rag": Figure.ratio(
            seconds["first token, regrad"], seconds["first token, rag"], first, "the bare model's, question alone"
        ),
        "online.over_cached": Figure.ratio(
            seconds["online"], seconds["regrad"], 1 + median(seconds["gradients' floor"]) / median(seconds["regrad"]),
            "the bare model forward and half-way backward over the passages, and the cached answer",
        ),
    }  # fmt: skip
    details = {"ms": milliseconds(seconds), "gflop": gflop, "answer_tokens": ANSWER_TOKENS, "top_k": TOP_K}
    details["ms_of_parts"] = milliseconds({name: [part[name] for part in parts] for name in parts[0]})
    return figures, details


def bench_batch(
    bench: Bench, rounds: int, size: int = 16, on_round: Callable[[int], None] = lambda _: None
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """A batch of questions, each with its own atoms: beside the bare model's batch, and one after another."""
    adapter = bench.regrad.adapter

    def asked(turn: int) -> list[Question]:
        return [bench.asked(turn * size + i) for i in range(size)]

    sums = [
        [bench.sum(bench.search(question, with_records=True)) for question in asked(turn)] for turn in range(rounds)
    ]

    def together(turn: int) -> None:
        with adapter.rows(sums[turn], [False] * size):
            bench.speak(adapter.model, [bench.prompt(question) for question in asked(turn)], ANSWER_TOKENS)

    def one_by_one(turn: int) -> None:
        for question, atom_sum in zip(asked(turn), sums[turn], strict=True):
            with adapter.applied_sum(atom_sum):
                bench.speak(adapter.model, [bench.prompt(question)], ANSWER_TOKENS)

    def bare(turn: int) -> None:
        bench.speak(bench.bare, [bench.prompt(question) for question in asked(turn)], ANSWER_TOKENS)

    together(0), bare(0)  # warm up
    seconds = in_turns({"batch": together, "one by one": one_by_one, "bare batch": bare}, rounds, on_round)
    many = bench.regrad.answer_many([question.question for question in asked(0)], top_k=TOP_K)
    single = [bench.regrad.answer(question.question, top_k=TOP_K) for question in asked(0)]
    same = sum(a.text == b.text for a, b in zip(many, single, strict=True))
    figures = {
        "batch.throughput_over_bare": Figure.ratio(
            seconds["bare batch"], seconds["batch"], 1.0, "the bare model's batch of the same prompts"
        ),
        "batch.speedup_over_sequential": Figure.ratio(
            seconds["one by one"], seconds["batch"],
            median(a / b for a, b in zip(seconds["one by one"], seconds["bare batch"], strict=True)),
            "what the bare model's batch would reach",
        ),
    }  # fmt: skip
    details = {"batch": size, "same_answers": f"{same} of {size}", "s": {k: median(v) for k, v in seconds.items()}}
    return figures, details


def _copy_seconds(size: int, device: torch.device) -> float:
    """Seconds of one copy of so many bytes, the best of some."""
    source = torch.empty(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        finish()
        best = min(best, time.perf_counter() - started)
    return best
