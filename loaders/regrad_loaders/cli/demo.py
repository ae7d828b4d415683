"""The command `regrad-qdrant demo`: everything, from invented texts to answers, on an embedded bank."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from regrad_loaders.cli.tables import answers_table, scores_table
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import console, progress
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    Batch,
    CodecName,
    Device,
    Dtype,
    Init,
    JsonOut,
    TopK,
    bank_of,
    check_outputs,
    ingest_corpus,
    load,
    regrad_of,
    store_of,
    write_json,
)

DEMO_PEOPLE, DEMO_QUESTIONS, DEMO_SEED = 60, 48, 1


def demo(
    path: Annotated[Path, typer.Option("--path", help="Folder of the demo's bank; kept for the next run.")] = Path(
        "regrad_bank"
    ),
    init: Init = DEFAULT_INIT,
    device: Device = "auto",
    dtype: Dtype = "auto",
    modes: Annotated[str, typer.Option("--modes", help="Comma-separated.")] = "direct,rag,regrad,regrad+icl,random",
    codec: CodecName = DEFAULT_CODEC,
    top_k: TopK = 3,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many questions.")] = DEMO_QUESTIONS,
    batch: Batch = 8,
    json_out: JsonOut = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", help="Write one JSON line an answer.")] = None,
) -> None:
    """A real model answers questions about invented people, from gradients in an embedded Qdrant bank."""
    from regrad_loaders.data.facts import generate
    from regrad_loaders.evaluation.evaluate import evaluate
    from regrad_loaders.evaluation.plan import parse_modes
    from regrad_loaders.evaluation.results import write_predictions

    chosen = parse_modes(modes)
    check_outputs(json_out, predictions)
    world = generate("demo", DEMO_PEOPLE, DEMO_SEED, questions_per_person=1)
    questions = world.questions[:limit]
    initialization, model, tokenizer = load(init, None, device, dtype)
    with bank_of(store_of("demo", None, path), initialization, DEFAULT_KEY, None) as bank:
        regrad = regrad_of(model, tokenizer, bank, initialization, None)
        report = ingest_corpus(regrad, world.passages, codec, replace=True)  # the demo's own bank
        status = bank.status()
        settings = {
            "command": "demo",
            "init": init,
            "base_model": initialization.base.name,
            "dtype": dtype,
            "space": initialization.fingerprint,
            "modes": chosen,
            "top_k": top_k,
            "batch": batch,
            "codec": status.codec,
            "merge": asdict(regrad.weighing.merge),
            "people": DEMO_PEOPLE,
            "seed": DEMO_SEED,
        }
        with progress("Answering", len(questions) * len(chosen)) as advance:
            result = evaluate(
                regrad,
                questions,
                chosen,
                top_k=top_k,
                batch=batch,
                settings=settings,
                on_progress=lambda _: advance(1),
            )
    console.print(answers_table(result, chosen))
    console.print(scores_table(result))
    console.print(
        f"{status.atoms} atoms in {path}/demo, {status.bytes_median} bytes each in the payload (codec {status.codec}); "
        + (
            f"computed now, {report.documents_per_second:.1f} documents/s"
            if report.atoms_written
            else "found in the bank, none computed"
        )
    )
    if predictions:
        write_predictions(result, predictions)
    write_json(json_out, result.as_dict() | {"bank": status.as_dict(), "ingest": report.as_dict()})
