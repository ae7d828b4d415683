"""What a server stands: requests and tokens a second, and how long clients wait, from one client to a hundred.

The clients are a process of their own, which stream over sockets of this machine (`python -m
regrad_loaders.bench.serving` is that process). Every answer is compared with the library's own to the same question, so
that one lost, or answered with another's documents, shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regrad_loaders.bench.figures import Figure, percentile
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.errors import RegradError

BATCH = 32  # questions of `answer_many` that the server is measured against


@dataclass(frozen=True)
class Load:
    """What so many clients met."""

    model: str
    clients: int
    answered: int
    lost: int  # requests without a whole answer
    wrong: int  # answers that are not the library's own
    requests_per_second: float
    tokens_per_second: float
    first_token: tuple[float, float]  # seconds, the median and the 99th percentile
    end: tuple[float, float]

    @classmethod
    def of(cls, model: str, clients: int, met: Sequence[dict[str, Any]], own: dict[str, str] | None) -> Load:
        done = [one for one in met if one["text"] is not None]
        if not done:
            raise RegradError(f"the server answered none of {len(met)} requests of {clients} clients")
        seconds = max(one["at"] for one in met)
        first, whole = [one["first"] for one in done], [one["end"] for one in done]
        return cls(
            model,
            clients,
            len(done),
            len(met) - len(done),
            sum(own is not None and own[one["question"]] != one["text"] for one in done),
            len(done) / seconds,
            sum(one["tokens"] for one in done) / seconds,
            (percentile(first, 0.5), percentile(first, 0.99)),
            (percentile(whole, 0.5), percentile(whole, 0.99)),
        )


def bench_serving(
    regrad: ReGrad,
    questions: Sequence[str],
    counts: Sequence[int],
    seconds: float,
    on_load: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """So many clients at once, each for so many seconds, and the same questions through `answer_many`.

    Args:
        regrad: over a bank that holds the atoms.
        counts: of clients.
    """
    from regrad_qdrant.serve.app import make_app, served
    from regrad_qdrant.serve.engine import Engine
    from regrad_qdrant.serve.metrics import Metrics
    from regrad_qdrant.serve.service import Keys, Service

    own: dict[str, str] = {}
    started, tokens = time.perf_counter(), 0
    for at in range(0, len(questions), BATCH):
        part = questions[at : at + BATCH]
        answers = regrad.answer_many(part)
        own |= {question: answer.text for question, answer in zip(part, answers, strict=True)}
    library = len(questions) / (time.perf_counter() - started)
    tokens = sum(len(regrad.tokenizer(text, add_special_tokens=False).input_ids) for text in own.values())
    length = max(1, round(tokens / len(questions)))  # of the bare model's answers too, which would be longer
    figures: dict[str, Figure] = {}
    loads: list[Load] = []
    engine = Engine(batch=BATCH, queue=1000)
    app = make_app(Service(regrad, None, engine, Keys(), deadline=600), Metrics())
    with served(app) as url:
        for count in counts:
            for model in ("regrad", "direct") if count == BATCH else ("regrad",):
                met = _clients(url, model, questions, count, seconds, length if model == "direct" else None)
                loads.append(Load.of(model, count, met, own if model == "regrad" else None))
                on_load(1)
    for load in loads:
        if load.model == "regrad":
            name = f"{load.clients} client{'s' if load.clients > 1 else ''}"
            ratio = load.requests_per_second / library
            figures[f"requests a second, {name} ÷ answer_many of {BATCH}"] = Figure(ratio, ratio, ratio, "times")
    at_batch = {load.model: load for load in loads if load.clients == BATCH}
    if len(at_batch) == 2:
        ratio = at_batch["regrad"].requests_per_second / at_batch["direct"].requests_per_second
        name = f"requests a second, regrad ÷ the bare model with answers as long, {BATCH} clients"
        figures[name] = Figure(ratio, ratio, ratio, "times")
    details = {
        "answer_many": {"questions_per_second": library, "tokens_per_second": tokens * library / len(questions)},
        "loads": [asdict(load) for load in loads],
    }
    return figures, details


def _clients(
    url: str, model: str, questions: Sequence[str], count: int, seconds: float, length: int | None
) -> list[dict[str, Any]]:
    given = json.dumps(
        {
            "url": url, "model": model, "questions": list(questions), "count": count, "seconds": seconds,
            "length": length,
        }
    )  # fmt: skip
    command = [sys.executable, "-m", "regrad_loaders.bench.serving"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    met: list[dict[str, Any]] = json.loads(done.stdout)
    return met


async def _load(
    url: str, model: str, questions: list[str], count: int, seconds: float, length: int | None
) -> list[dict[str, Any]]:
    """What every request of so many clients met; each asks again as soon as it has an answer."""
    import httpx

    met: list[dict[str, Any]] = []
    began = time.perf_counter()

    async def ask(client: httpx.AsyncClient, question: str) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": length,
        }
        started, first, text, tokens, ended = time.perf_counter(), None, "", 0, False
        with contextlib.suppress(httpx.HTTPError):  # a connection that was dropped is an answer that is lost
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    for choice in event.get("choices", ()):
                        piece = choice["delta"].get("content") or ""
                        if piece and first is None:
                            first = time.perf_counter() - started
                        text += piece
                    ended = ended or "regrad" in event  # the last of an answer
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        now = time.perf_counter()
        whole = text if ended else None
        met.append(
            {
                "question": question,
                "text": whole,
                "tokens": tokens,
                "first": now - started if first is None else first,
                "end": now - started,
                "at": now - began,
            }
        )

    async def one(number: int) -> None:
        async with httpx.AsyncClient(timeout=600) as client:
            turn = number * 7
            while time.perf_counter() - began < seconds:
                await ask(client, questions[turn % len(questions)])
                turn += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return met


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(_load(**json.load(sys.stdin)))))
