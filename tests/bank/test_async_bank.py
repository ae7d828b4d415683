import asyncio
import gc
import inspect
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_initialization, tiny_model
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from regrad_qdrant import AsyncGradientBank, Document, GradientBank, ReGrad
from regrad_qdrant.answer import batching
from regrad_qdrant.answer.batching import Batcher
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.errors import BankError

SPACE = "a" * 16
TEXTS = ("Ida Corvand works as a baker.", "Noor Selowan works as a diver.", "Orla Thornaby plays the harp.")
DOCUMENTS = [Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS)]


def records():
    torch.manual_seed(0)
    made = make_records(torch.randn(2, 300), list(TEXTS[:2]), SPACE, "int8")
    return [(point_id(f"d{i}"), record) for i, record in enumerate(made)]


async def awaited(value):
    if inspect.isasyncgen(value):
        return [item async for item in value]
    return await value if inspect.isawaitable(value) else list(value) if inspect.isgenerator(value) else value


async def life(bank):
    """What every step of a bank's life returns."""
    odd = models.Filter(must=[models.HasIdCondition(has_id=[point_id("d1")])])
    steps = [
        lambda: bank.create(),
        lambda: bank.add(DOCUMENTS),
        lambda: bank.detect_layout(),
        lambda: bank.put(records()),
        lambda: bank.search("Noor the diver", 2),
        lambda: bank.search("Noor the diver", 2, query_filter=odd, with_records=False),
        lambda: bank.fetch([point_id("d1"), point_id("gone")], [0.5, 0.1]),
        lambda: bank.points(),
        lambda: bank.points(odd),
        lambda: bank.missing(),
        lambda: bank.sync([Document("d0", {"id": "d0", "text": "Ida Corvand works as a judge."})]),
        lambda: bank.stale(),
        lambda: bank.status(),
        lambda: bank.recode("sign", AtomLayout.flat(300)),
        lambda: bank.drop(),
        lambda: bank.status(),
    ]
    return [await awaited(step()) for step in steps]


@pytest.mark.parametrize("sidecar", [None, "atoms"])
def test_every_method_does_what_the_banks_own_does(sidecar):
    async def over_async_client():
        async with AsyncGradientBank(AsyncQdrantClient(":memory:"), "docs", SPACE, sidecar=sidecar) as bank:
            return await life(bank)

    async def over_client():
        return await life(GradientBank(QdrantClient(":memory:"), "docs", SPACE, sidecar=sidecar))

    assert asyncio.run(over_async_client()) == asyncio.run(over_client())


def test_each_client_has_a_bank_of_its_own_kind():
    with pytest.raises(BankError, match="goes into an AsyncGradientBank"):
        GradientBank(AsyncQdrantClient(":memory:"), "docs", SPACE)


@pytest.mark.parametrize("stream", ["points", "missing", "stale"])
@pytest.mark.parametrize("sidecar", [None, "atoms"])
def test_a_stream_may_be_the_first_thing_that_is_asked_of_a_bank(stream, sidecar):
    async def over_async_client():
        client = AsyncQdrantClient(":memory:")
        async with AsyncGradientBank(client, "docs", SPACE, sidecar=sidecar) as bank:
            await bank.create()
            await bank.add(DOCUMENTS)
        async with AsyncGradientBank(client, "docs", SPACE, sidecar=sidecar) as bank:
            return await awaited(getattr(bank, stream)())

    assert len(asyncio.run(over_async_client())) == (0 if stream == "stale" else len(TEXTS))


def test_the_async_bank_has_every_public_method_of_the_bank():
    def methods(kind):
        return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}

    inside = {
        "index",
        "describe",
        "count_atoms",
        "count_of_other_spaces",
        "has_other_spaces",
        "check_fields",
        "check_document",
        "count_with_atoms",
        "count_current",
        "open",
        "in_space",
        "in_this_space",
        "forget",
        "scroll",
        "joined",
        "with_atoms",
        "belongs",
        "hit",
        "examined",
        "surveyed",
        "orphans",
        "noted",
        "known",
        "embed_with",
        "note_sidecar",
        "keep_atoms_in",
        "look_again",
        "absent_fields",
        "check_place",
        "notes_other_spaces",
        "name_documents_by",
    }  # parts of ingestion, which is a command, and of the methods that are there
    assert methods(GradientBank) - inside <= methods(AsyncGradientBank)
    for name in ("points", "recode", "drop", "put", "sync", "add"):
        here, there = (inspect.signature(getattr(kind, name)) for kind in (AsyncGradientBank, GradientBank))
        assert list(here.parameters) == list(there.parameters), name


async def with_documents(space):
    """A bank of documents without atoms."""
    bank = AsyncGradientBank(AsyncQdrantClient(":memory:"), "docs", space)
    await bank.create()
    await bank.add(DOCUMENTS)
    return bank


@pytest.fixture
def regrad(tokenizer):
    """Answers over an async client whose collection was filled before."""
    model = tiny_model()
    initialization = tiny_initialization(model)

    async def filled():
        bank = await with_documents(initialization.fingerprint)
        regrad = ReGrad(model, tokenizer, bank, initialization)
        bank.bind()
        await asyncio.to_thread(attach_atoms, bank.blocking, regrad.gradients, "sign")
        return regrad

    return filled


def test_answers_are_those_of_the_blocking_call_and_the_loop_goes_on(regrad, tokenizer):
    async def main():
        over_loop = await regrad()
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        questions = ["What does Ida do?", "What does Noor do?", "What does Orla play?"]
        answers = await asyncio.gather(*(over_loop.aanswer(question, top_k=2) for question in questions))
        ticking.cancel()
        return questions, answers, ticks, [await asyncio.to_thread(over_loop.answer, q, top_k=2) for q in questions]

    questions, answers, ticks, expected = asyncio.run(main())
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [answer.hits for answer in answers] == [answer.hits for answer in expected]
    assert ticks > 5  # the loop was free while the model worked


def test_a_blocking_call_on_the_loop_is_refused_instead_of_waiting_for_ever(regrad):
    async def main():
        over_loop = await regrad()
        with pytest.raises(BankError, match="without await"):
            over_loop.answer("What does Ida do?")
        return over_loop

    over_loop = asyncio.run(main())
    with pytest.raises(BankError, match="no event loop runs"):
        over_loop.answer("What does Ida do?")


class Resolving:
    """An async client whose every request first needs the loop's own executor, as resolving a host name does."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        method = getattr(self.client, name)

        async def request(*arguments, **options):
            await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.001)
            return await method(*arguments, **options)

        return request if asyncio.iscoroutinefunction(method) else method


def test_two_hundred_questions_at_once_are_all_answered_while_requests_need_the_loops_executor(regrad):
    questions = [("What does Ida do?", "What does Noor do?", "What does Orla play?")[i % 3] for i in range(200)]

    async def main():
        over_loop = await regrad()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        client = over_loop.bank.store.client
        over_loop.bank.store.client = over_loop.bank.atoms.client = Resolving(client)
        answers = await asyncio.wait_for(
            asyncio.gather(*(over_loop.aanswer(question, top_k=2) for question in questions)), 60
        )
        again = await over_loop.aanswer_many(questions[:3], top_k=2)
        over_loop.close()
        return answers, again

    answers, again = asyncio.run(main())
    assert [answer.text for answer in answers] == [again[i % 3].text for i in range(200)]
    assert [answer.hits for answer in answers[:3]] == [answer.hits for answer in again]


def test_questions_that_wait_together_share_a_batch_and_one_that_fails_fails_alone():
    sizes = []

    def work(items):
        sizes.append(len(items))
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    async def main():
        batcher = Batcher(work, size=4, wait=0.05)
        given = await asyncio.gather(
            *(batcher.ask(item) for item in ["a", "b", "bad", "c", "d"]), return_exceptions=True
        )
        left = asyncio.ensure_future(batcher.ask("e"))
        await asyncio.sleep(0)
        left.cancel()
        last = await batcher.ask("f")
        batcher.close()
        assert await batcher.ask("g") == "G"  # begins anew
        batcher.close()
        return given, last

    (a, b, bad, c, d), last = asyncio.run(main())
    assert (a, b, c, d, last) == ("A", "B", "C", "D", "F") and isinstance(bad, ValueError)
    assert sizes[0] == 4 and max(sizes) == 4


def test_a_batcher_that_nobody_asks_keeps_nothing(monkeypatch):
    monkeypatch.setattr(batching, "IDLE", 0.05)

    class Work:
        def done(self, items):
            return items

    work = Work()
    kept, batcher = weakref.ref(work), Batcher(work.done, size=4, wait=0.0)
    assert asyncio.run(batcher.ask("a")) == "a"
    thread = batcher._thread
    thread.join(5)
    assert not thread.is_alive() and asyncio.run(batcher.ask("b")) == "b"  # and begins anew
    batcher._thread.join(5)
    del work, batcher
    gc.collect()
    assert kept() is None


def test_a_sidecar_that_is_not_there_yet_is_made_when_the_first_atom_is_stored(tokenizer):
    model = tiny_model()
    initialization = tiny_initialization(model)

    async def main():
        client = AsyncQdrantClient(":memory:")
        bank = AsyncGradientBank(client, "docs", initialization.fingerprint, sidecar="atoms")
        await AsyncGradientBank(client, "docs", initialization.fingerprint).create()
        await bank.add(DOCUMENTS)
        with ReGrad(model, tokenizer, bank, initialization, on_missing="store") as regrad:
            answer = await regrad.aanswer("What does Ida do?", top_k=1)
        return answer, await client.collection_exists("atoms"), (await bank.status()).atoms

    answer, made, atoms = asyncio.run(main())
    assert made and atoms == 1 == len(answer.weights)


def test_a_bank_that_was_filled_elsewhere_is_answered_from_at_once(tokenizer):
    model = tiny_model()
    initialization = tiny_initialization(model)

    async def main():
        filled = await with_documents(initialization.fingerprint)
        bank = AsyncGradientBank(filled.blocking.store.client, "docs", initialization.fingerprint)
        with ReGrad(model, tokenizer, bank, initialization, on_missing="store") as regrad:
            free = await regrad.aanswer("What does Ida do?", top_k=1)
            return free, await regrad.aanswer("What does Ida do?", top_k=1, grounded=True)

    free, span = asyncio.run(main())
    assert len(free.weights) == 1 and span.source is not None
