"""The command that answers one question: `regrad-qdrant ask`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import console
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    AnswerStyle,
    BankPath,
    Collection,
    Dense,
    Device,
    Dtype,
    Init,
    JsonOut,
    Key,
    Merge,
    Model,
    PromptFile,
    Sidecar,
    TextPath,
    TopK,
    Url,
    Using,
    bank_of,
    check_merge,
    check_outputs,
    check_vector,
    existing_store,
    load,
    regrad_of,
    style_of,
    write_json,
)
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from qdrant_client.models import Filter

    from regrad_qdrant.answer.query import Source
    from regrad_qdrant.bank.documents import Hit

_WHOLE, _NUMBER = re.compile(r"-?[0-9]+"), re.compile(r"-?[0-9]+(\.[0-9]+)?")


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    collection: Collection,
    mode: Annotated[
        str,
        typer.Option("--mode", "-m", help="direct, rag, pe-rag, regrad, regrad+icl, online, random, init or init+icl."),
    ] = "regrad",
    top_k: TopK = 3,
    type: Annotated[str, typer.Option("--type", help="open, yesno or choice.")] = "open",
    choice: Annotated[list[str] | None, typer.Option("--choice", help="One of the choices; repeat it.")] = None,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    using: Using = None,
    dense: Dense = None,
    merge: Merge = None,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    text_path: TextPath = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--filter", help="FIELD=VALUE: only documents with that value; dots descend; repeat it."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Of the answer; 24 for an open question by default.")
    ] = None,
    style: AnswerStyle = "short",
    grounded: Annotated[
        bool, typer.Option("--grounded", help="Answer an open question with a span of the retrieved texts.")
    ] = False,
    auto: Annotated[
        bool, typer.Option("--auto", help="The span or a free answer, whichever the model is surer of.")
    ] = False,
    prompt_file: PromptFile = None,
    json_out: JsonOut = None,
) -> None:
    """Answer one question from the bank."""
    from regrad_qdrant.answer.query import MODES
    from regrad_qdrant.model.prompts import QUESTION_TYPES, Prompt, PromptFormat

    chosen = next((known for known in MODES if known == mode), None)
    if chosen is None:
        several = "; regrad-qdrant eval compares modes" if "," in mode else ""
        raise DataError(f"mode {mode!r} is not one of {', '.join(MODES)}{several}")
    if type not in QUESTION_TYPES:
        raise DataError(f"type {type!r} is not one of {', '.join(QUESTION_TYPES)}")
    answer_style = style_of(style)
    check_outputs(json_out)
    prompt = Prompt(question, type, tuple(choice or ()))  # type: ignore[arg-type] # checked above
    check_merge(merge)
    own = None if prompt_file is None else PromptFormat.load(prompt_file)
    store = existing_store(collection, url, path)
    if chosen not in ("direct", "init"):
        check_vector(store, using, dense)
    initialization, base, tokenizer = load(init, model, device, dtype)
    with bank_of(store, initialization, payload_key, dense, text_path, using, sidecar) as bank:
        regrad = regrad_of(base, tokenizer, bank, initialization, merge, prompt=own)
        answer = regrad.answer(
            prompt.question,
            mode=chosen,
            top_k=top_k,
            type=prompt.type,
            choices=prompt.choices,
            using=using,
            query_filter=_filter_of(only or []),
            max_new_tokens=max_new_tokens,
            grounded="auto" if auto else grounded,
            style=answer_style,
        )
    console.print(answer.text, style="bold", markup=False, soft_wrap=True)
    if answer.finish == "length":
        console.print("  (cut here: --max-new-tokens lets it be longer)", style="dim")
    if answer.source is not None:
        console.print(f"  {_place(answer.source, answer.hits)}", markup=False, highlight=False, soft_wrap=True)
    for hit in answer.hits:
        line = f"  {hit.score:8.3f}  {hit.document_id}  {hit.text[:90]!r}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    parts = "  ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in asdict(answer.timings).items())
    console.print(f"  {parts}  ({answer.prompt_tokens} prompt tokens)", style="dim")
    write_json(
        json_out,
        {
            "question": question,
            "mode": answer.mode,
            "answer": answer.text,
            "finish": answer.finish,
            "hits": [{"id": hit.document_id, "score": hit.score, "text": hit.text} for hit in answer.hits],
            "weights": {str(key): weight for key, weight in answer.weights.items()},
            "windows": {
                str(key): [{"start": start, "end": end, "share": share} for (start, end), share in part.items()]
                for key, part in answer.windows.items()
            },
            "skipped": {str(key): why for key, why in answer.skipped.items()},
            "source": asdict(answer.source) if answer.source else None,
            "notes": list(answer.notes),
            "timings": asdict(answer.timings),
            "prompt_tokens": answer.prompt_tokens,
        },
    )


def _place(source: Source, hits: Sequence[Hit]) -> str:
    """The document and the characters of a grounded answer, with the text around them where it is at hand."""
    place = f"{source.document_id}, characters {source.start} to {source.end}"
    for hit in hits:
        if hit.document_id == source.document_id:
            text = hit.text
            before, said, after = text[: source.start][-40:], text[source.start : source.end], text[source.end :][:40]
            return f"{place}: …{before}[{said}]{after}…".replace("\n", " ")
    return place


def _filter_of(conditions: list[str]) -> Filter | None:
    """The filter of FIELD=VALUE conditions, all of which must hold; numbers and true and false match as such too."""
    from qdrant_client import models

    must: list[models.Condition] = []
    for condition in conditions:
        field, equals, text = condition.partition("=")
        if not (field and equals):
            raise DataError(f"--filter wants FIELD=VALUE, found {condition!r}")
        values: list[str | int | bool] = [text]
        if _WHOLE.fullmatch(text) and -(2**63) <= int(text) < 2**63:
            values.append(int(text))
        if text in ("true", "false"):
            values.append(text == "true")
        either = [models.FieldCondition(key=field, match=models.MatchValue(value=value)) for value in values]
        if _NUMBER.fullmatch(text) and abs(float(text)) <= 2**53:  # larger ones are no whole numbers any more
            either.append(models.FieldCondition(key=field, range=models.Range(gte=float(text), lte=float(text))))
        must.append(either[0] if len(either) == 1 else models.Filter(should=list(either)))
    return models.Filter(must=must) if must else None
