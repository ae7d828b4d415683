"""Requests of ours in vLLM's engine: each with its update as a LoRA of its own, beside vLLM's other requests."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regrad_qdrant.answer.generation import Generated
from regrad_qdrant.answer.pipeline import answer_of
from regrad_qdrant.answer.query import BARE, Timings
from regrad_qdrant.answer.running import Row, Sampling
from regrad_qdrant.serve.job import DeadlineError, Job, Outcome, QueueFullError
from regrad_qdrant.serve.vllm.grammar import grammar_of, source_of
from regrad_qdrant.serve.vllm.updates import Updates

if TYPE_CHECKING:
    from regrad_qdrant.answer.generation import Finish
    from regrad_qdrant.model.prompts import Prompt

ID_BITS = 62  # of a LoRA's id: drawn, for several API processes of vLLM's share an engine
THREADS = 4  # that decode atoms


class VllmEngine:
    """Answers requests with vLLM's engine.

    Args:
        client: vLLM's `EngineClient`.
        ends: the tokens that end an answer.
        queue: requests that wait or run, at most.
    """

    def __init__(self, client: Any, ends: Sequence[int], *, queue: int = 256) -> None:
        self.client, self.ends, self.limit = client, list(ends), queue
        self._running = 0
        self._threads = ThreadPoolExecutor(THREADS, "regrad-updates")

    @property
    def waiting(self) -> int:
        """None: vLLM is given all of them at once."""
        return 0

    @property
    def running(self) -> int:
        return self._running

    @property
    def alive(self) -> bool:
        return not self.client.errored

    def check_room(self, coming: int = 0) -> None:
        """As `AnswersJobs.check_room`."""
        if self._running + coming >= self.limit:
            raise QueueFullError(f"{self.limit} requests are waiting already")

    def close(self) -> None:
        """End the threads; vLLM's engine is vLLM's."""
        self._threads.shutdown(wait=False)

    async def answer(self, job: Job[Updates]) -> AsyncIterator[str | Outcome]:
        """As `AnswersJobs.answer`."""
        self.check_room()
        self._running += 1
        pieces = self._answer(job)
        try:
            while True:  # each piece by itself: another task may ask for the next one
                try:
                    piece = await asyncio.wait_for(anext(pieces), max(job.deadline - time.monotonic(), 0))
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise DeadlineError("the answer was not done in time") from error
                yield piece
        finally:
            await pieces.aclose()
            self._running -= 1

    async def _answer(self, job: Job[Updates]) -> AsyncGenerator[str | Outcome]:
        started = time.perf_counter()
        asked, updates = job.found.asked, job.regrad
        prompt = asked.prompt(job.found.hits)
        loop = asyncio.get_running_loop()
        update, merged = await loop.run_in_executor(self._threads, updates.merged, job.found)
        lora = None
        if update is not None:
            from vllm.lora.request import LoRARequest

            drawn = secrets.randbits(ID_BITS) | 1 << ID_BITS - 1  # vLLM's own ids count from 1
            # A name is one request's alone: vLLM takes two LoRAs of one name for the same, whatever their ids.
            lora = LoRARequest(f"regrad-{drawn:x}", drawn, update.path)
            await self.client.add_lora(lora)  # an update that fails here fails alone; in a step it would end the engine
        decoded = time.perf_counter()
        sampling = Sampling() if asked.grounded else job.sampling  # a span is whole
        row = Row(prompt, updates.tokenizer, updates.asking, None, asked.mode in BARE, sampling)
        source, first = None, decoded
        if prompt.options:
            row.text, row.finish = await self._likeliest(prompt, row.prompt_ids, updates, lora), "stop"
            yield row.text
        else:
            grammar = grammar_of([hit.text for hit in job.found.sources]) if asked.grounded else None
            shown = ""
            async for _ in self._said(row, job, lora, grammar):
                if not row.tokens[1:]:
                    first = time.perf_counter()
                if row.shown != shown and row.shown.startswith(shown):
                    yield row.shown[len(shown) :]
                    shown = row.shown
            source = source_of(row.text, job.found.sources) if grammar else None
        timings = Timings(job.search, decoded - started, generate=time.perf_counter() - decoded)
        generated = Generated(row.text, len(row.prompt_ids), finish=row.finish or "stop")
        said = answer_of(generated, job.found, merged, timings)
        count = len(row.tokens or updates.tokenizer(row.text, add_special_tokens=False).input_ids)
        yield Outcome(replace(said, source=source), count, 0.0, first - decoded)

    async def _said(self, row: Row, job: Job[Updates], lora: Any, grammar: str | None) -> AsyncIterator[None]:
        """Let vLLM say an answer token by token into the row; whoever leaves early ends it in vLLM too."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = job.sampling
        free = {} if grammar else {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        params = SamplingParams(
            **({"temperature": 0.0} | free),
            max_tokens=row.length,
            stop_token_ids=self.ends,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(grammar=grammar) if grammar else None,
        )
        outputs = self.client.generate(_prompt(row.prompt_ids), params, _request_id(), lora_request=lora)
        ended: Finish = "stop"
        try:
            async for output in outputs:
                if output.outputs[0].finish_reason == "length":  # no room is left in the model's context
                    ended = "length"
                for token in output.outputs[0].token_ids:
                    row.add(int(token), self.ends)
                    yield None
                    if row.finish is not None:
                        return
            row.finish = ended
        finally:
            await outputs.aclose()

    async def _likeliest(self, prompt: Prompt, prompt_ids: list[int], updates: Updates, lora: Any) -> str:
        """Of the options the one whose tokens, and its end, have the highest mean log-probability."""
        asking, tokenizer = updates.asking, updates.tokenizer
        targets = [asking.target(tokenizer, prompt, said) for said, _ in prompt.spellings]
        following: dict[tuple[int, ...], set[int]] = {}  # of what was said, the tokens that may come next
        for target in targets:
            for i, token in enumerate(target):
                following.setdefault(tuple(target[:i]), set()).add(token)
        asked = [self._log_probabilities([*prompt_ids, *said], tokens, lora) for said, tokens in following.items()]
        known = dict(zip(following, await asyncio.gather(*asked), strict=True))
        means = [sum(known[tuple(of[:i])][token] for i, token in enumerate(of)) / len(of) for of in targets]
        return prompt.spellings[means.index(max(means))][1]

    async def _log_probabilities(self, ids: list[int], tokens: set[int], lora: Any) -> dict[int, float]:
        """Of each of these tokens after others. (vLLM's log-probabilities of a prompt fail beside a LoRA.)"""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=sorted(tokens), detokenize=False)
        async for output in self.client.generate(_prompt(ids), params, _request_id(), lora_request=lora):
            found = output.outputs[0].logprobs[0]
        return {token: float(found[token].logprob) for token in tokens}


def _prompt(ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": ids}


def _request_id() -> str:
    return f"regrad-{uuid.uuid4().hex}"
