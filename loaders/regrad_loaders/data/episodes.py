"""Episodes for meta-training: a batch of passages that serves many questions at once.

Each question meets the passages that BM25 returns for it, with their scores, as at query time. A batch is
grown from random questions: their gold passages and hard negatives, then further questions about the passages
that are there already. A passage's gradient is computed once and serves every question that retrieves it.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regrad_loaders.data.folders import Dataset, Question
from regrad_qdrant.bank.relevance import by_rank
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import Prompt, PromptFormat, Style

RETRIEVAL_DEPTH = 10
ANSWER_TOKENS = 40  # of an answer that are trained on, without its end
DRAWS = 100  # of an episode that holds a question, before the data is given up on


@dataclass(frozen=True)
class Example:
    """One question of an episode, with its retrieved passages as rows of the episode's passages."""

    question_id: str
    prompt_ids: list[int]
    answer_ids: list[int]  # with what ends an answer
    rows: list[int]
    scores: list[float]
    question: str = ""
    answers: tuple[str, ...] = ()
    answer_size: int = 0  # tokens of `answer_ids` before the end


@dataclass
class Episode:
    """Passages (token ids, one gradient each) and the questions that they serve."""

    passages: list[list[int]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    source: str = ""  # the data set it came from


@dataclass(frozen=True)
class _Entry:
    question: Question
    kind_prompt: list[int]
    hits: dict[str, float]  # passage id → score, best first, gold ones always among them


class EpisodeSource:
    """Draws episodes from one data set.

    Args:
        dataset: passages and the questions to train on (already restricted to their split).
        tokenizer: of the base model.
        passage_tokens: longer passages are cut to a window of this many tokens that holds the answer.
        passages_in_prompt: the share of questions with their passages in the prompt, as in the mode `regrad+icl`.
        format: how questions are put, and what ends an answer.
        style: of the questions' answers.
        retrieved: an episode is one question and what BM25 returns for it, gold or not, from its beginning on.
        label: whether passages carry in front what they have in a prompt, such as "Passage 1: ".
        first_answer: learn the first of a question's answers, instead of any.
    """

    def __init__(
        self,
        dataset: Dataset,
        questions: Sequence[Question],
        tokenizer: Any,
        passage_tokens: int,
        passages_in_prompt: float = 0.0,
        format: PromptFormat | None = None,
        style: Style = "short",
        *,
        retrieved: bool = False,
        label: bool = False,
        first_answer: bool = False,
    ) -> None:
        self.name = dataset.name
        self.retrieved, self.label, self.first_answer = retrieved, label, first_answer
        self.passages_in_prompt = passages_in_prompt
        self.style = style
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        self.passage_tokens = passage_tokens
        self.texts = {passage.id: passage.text for passage in dataset.passages}
        asked = [question for question in questions if question.gold_ids or retrieved]
        if not asked:
            raise DataError(
                f"{dataset.name}: no question names its gold passages (gold_ids): nothing to train on, unless the "
                "recipe says passages: retrieved, and takes what retrieval returns"
            )
        for question in [] if retrieved else asked:
            unknown = [key for key in question.gold_ids if key not in self.texts]
            if unknown:
                raise DataError(
                    f"{dataset.name}: question {question.id!r} names passage {unknown[0]!r}, not in the corpus"
                )
        self.entries = [self._entry(question, found) for question, found in zip(asked, self._hits(asked), strict=True)]
        self.by_gold: dict[str, list[_Entry]] = defaultdict(list)
        for entry in self.entries:
            for gold in entry.question.gold_ids[:1]:
                self.by_gold[gold].append(entry)
        self.golds = {key for question in asked for key in question.gold_ids}
        self._encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    def _hits(self, asked: Sequence[Question]) -> list[dict[str, float]]:
        """What was retrieved for each question: the data's own, which say an order alone, or by BM25."""
        if all("retrieved" in question.fields for question in asked):
            own = [question.fields["retrieved"] for question in asked]
            return [dict(zip(found, by_rank(len(found)), strict=True)) for found in own]
        return bm25_hits(self.texts, [question.question for question in asked])

    def _entry(self, question: Question, hits: dict[str, float]) -> _Entry:
        lowest = min(hits.values(), default=1.0)
        for gold in (
            () if self.retrieved else question.gold_ids
        ):  # a gold passage that retrieval missed is trained on as its last hit
            hits.setdefault(gold, lowest)
        return _Entry(question, self._prompt(question), hits)

    def _prompt(self, question: Question, passages: tuple[str, ...] = ()) -> list[int]:
        asked = Prompt(question.question, question.kind, question.choices, passages, style=self.style)
        prompt = asked.render(self.tokenizer, self.format)
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return ids

    def episode(self, rng: random.Random, passages: int, questions_per_passage: int, top_k: Sequence[int]) -> Episode:
        """An episode of about `passages` passages, every question with k drawn from `top_k`.

        Raises:
            DataError: if no draw finds a question whose gold passages, or windows of them, hold an answer together.
        """
        for _ in range(DRAWS):
            if self.retrieved:
                episode = self._with_its_own(rng.choice(self.entries), rng.choice(top_k), rng)
            else:
                episode = self._draw(rng, passages, questions_per_passage, top_k)
            if episode.examples:
                return episode
        raise DataError(
            f"{self.name}: in {DRAWS} draws of {passages} passages no question has all its gold passages; "
            "allow more `passages` or `passage_tokens`"
        )

    def each(self, top_k: int) -> Iterator[Episode]:
        """An episode of every question with its retrieved passages."""
        rng = random.Random(0)
        found = (self._with_its_own(entry, top_k, rng) for entry in self.entries)
        return (episode for episode in found if episode.examples)

    def _with_its_own(self, entry: _Entry, k: int, rng: random.Random) -> Episode:
        """One question with its retrieved passages, as at query time."""
        chosen = {key: self._tokens(key)[0][: self.passage_tokens] for key in list(entry.hits)[:k]}
        if not chosen:
            return Episode()
        example = self._example(replace(entry, question=replace(entry.question, gold_ids=())), chosen, k, rng)
        return Episode(self._labelled(list(chosen.values())), [example], self.name)

    def _labelled(self, windows: list[list[int]]) -> list[list[int]]:
        """The passages as gradients are taken of them."""
        if not self.label:
            return windows
        found = []
        for number, ids in enumerate(windows, 1):
            text = self.format.passage.format(number=number, text="")
            label = self.tokenizer(text, add_special_tokens=False).input_ids
            first = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            found.append([*ids[:first], *label, *ids[first:]])
        return found

    def _draw(self, rng: random.Random, passages: int, questions_per_passage: int, top_k: Sequence[int]) -> Episode:
        """One draw: questions that can't be answered from the passages that it has room for are left out of it."""
        chosen: dict[str, list[int]] = {}  # passage id → window
        asked: list[tuple[_Entry, Question]] = []
        seen: set[str] = set()
        in_vain = 0  # draws in a row that brought no passage: few questions can share those that they are cut to
        while len(chosen) < min(passages, len(self.golds)) and in_vain < DRAWS:
            before, entry = len(chosen), rng.choice(self.entries)
            negatives = [key for key in entry.hits if key not in entry.question.gold_ids]
            k = max(rng.choice(top_k), len(entry.question.gold_ids))
            wanted = [*entry.question.gold_ids, *negatives][: min(k, max(2, passages - len(chosen)))]
            for key in wanted:
                if key not in chosen:
                    local = entry if key in entry.question.gold_ids else rng.choice(self.by_gold.get(key) or [entry])
                    chosen[key] = self._window(key, _in_text(local.question), rng)
            in_vain = in_vain + 1 if len(chosen) == before else 0
        for key in chosen:
            entries = self.by_gold.get(key, ())
            usable = [e for e in entries if self._answerable(e, chosen) and e.question.id not in seen]
            for entry in rng.sample(usable, min(questions_per_passage, len(usable))):
                seen.add(entry.question.id)
                asked.append((entry, entry.question))
        examples = [self._example(entry, chosen, rng.choice(top_k), rng) for entry, _ in asked]
        used = sorted({row for example in examples for row in example.rows})
        renumbered = {row: i for i, row in enumerate(used)}
        windows = list(chosen.values())
        return Episode(
            self._labelled([windows[row] for row in used]),
            [replace(example, rows=[renumbered[row] for row in example.rows]) for example in examples],
            self.name,
        )

    def _example(self, entry: _Entry, chosen: dict[str, list[int]], top_k: int, rng: random.Random) -> Example:
        rows = {key: row for row, key in enumerate(chosen)}
        ranked = [key for key in entry.hits if key in rows]
        golds = [key for key in entry.question.gold_ids if key in rows]
        kept = list(dict.fromkeys([*golds, *ranked]))[: max(top_k, len(golds))]
        prompt_ids = entry.kind_prompt
        share = self.passages_in_prompt
        if share == 1 or (share and rng.random() < share):
            best_first = sorted(kept, key=lambda key: -entry.hits[key])
            shown = tuple(self.tokenizer.decode(chosen[key], skip_special_tokens=True) for key in best_first)
            prompt_ids = self._prompt(entry.question, shown)
        answers = entry.question.answers
        answer = answers[0] if self.first_answer else rng.choice(answers)
        answer_ids = self.format.target(self.tokenizer, answer, ANSWER_TOKENS)
        return Example(
            question_id=f"{self.name}/{entry.question.id}",
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            rows=[rows[key] for key in kept],
            scores=[entry.hits[key] for key in kept],
            question=entry.question.question,
            answers=entry.question.answers,
            answer_size=len(answer_ids) - len(self.format.end_ids(self.tokenizer)),
        )

    def _answerable(self, entry: _Entry, chosen: dict[str, list[int]]) -> bool:
        """Whether every gold passage is there, and the window still holds the answer if the passage did."""
        if not all(gold in chosen for gold in entry.question.gold_ids):
            return False
        for gold in entry.question.gold_ids:
            full = self.texts[gold]
            answers = [answer for answer in _in_text(entry.question) if answer in full]
            if answers and len(chosen[gold]) == self.passage_tokens:
                window = self.tokenizer.decode(chosen[gold])
                if not any(answer in window for answer in answers):
                    return False
        return True

    def _tokens(self, key: str) -> tuple[list[int], list[tuple[int, int]]]:
        """A passage's tokens and the characters of each."""
        if key not in self._encoded:
            encoding = self.tokenizer(self.texts[key], return_offsets_mapping=True)
            self._encoded[key] = encoding.input_ids, encoding.offset_mapping
        return self._encoded[key]

    def _window(self, key: str, answers: Iterable[str], rng: random.Random) -> list[int]:
        """A passage, or a part of it that holds an answer and begins as a text does (BOS), as at ingestion."""
        ids, offsets = self._tokens(key)
        if len(ids) <= self.passage_tokens:
            return ids
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        room = self.passage_tokens - len(begin)
        spot = next((at for answer in answers if (at := self.texts[key].find(answer)) >= 0), 0)
        token = next((i for i, (_, end) in enumerate(offsets) if end > spot), 0)
        last = len(ids) - room
        start = max(len(begin), min(last, token - rng.randrange(self.passage_tokens * 3 // 4)))
        return begin + ids[start : start + room]


def _in_text(question: Question) -> tuple[str, ...]:
    """The answers as a passage has them: of one that is answered with a sentence, what that was made of."""
    found: tuple[str, ...] = question.fields.get("in_text", question.answers)
    return found


def bm25_hits(texts: dict[str, str], queries: Sequence[str], depth: int = RETRIEVAL_DEPTH) -> list[dict[str, float]]:
    """For each query the ids and scores of the `depth` best texts, best first, by an embedded Qdrant Edge shard."""
    import qdrant_edge as edge

    bm25 = edge.Bm25()
    keys = list(texts)
    config = edge.EdgeConfig(
        vectors={}, sparse_vectors={"bm25": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)}
    )
    with tempfile.TemporaryDirectory() as folder:
        shard = edge.EdgeShard.create(str(Path(folder)), config)
        points = [edge.Point(i, {"bm25": bm25.embed_document(texts[key])}, {}) for i, key in enumerate(keys)]
        shard.update(edge.UpdateOperation.upsert_points(points))
        found = []
        for query in queries:
            nearest = edge.Query.Nearest(bm25.embed_query(query), using="bm25")
            # The engine leaves the order of equal scores open; a run must not depend on it.
            points = shard.query(edge.QueryRequest(limit=2 * depth, query=nearest))
            ranked = sorted(points, key=lambda point: (-point.score, point.id))[:depth]
            found.append({keys[int(point.id)]: point.score for point in ranked})
        shard.close()
    return found
