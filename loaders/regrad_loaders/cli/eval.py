"""The command `regrad-qdrant eval`: the modes side by side on a question file."""

from __future__ import annotations

import functools
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrad_loaders.cli.tables import differences_table, scores_table, sweep_table
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import console, print_report, progress
from regrad_qdrant.cli.options import (
    DEFAULT_ICL_INIT,
    DEFAULT_INIT,
    AnswerStyle,
    BankPath,
    Batch,
    CodecName,
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
    add_passages,
    bank_of,
    check_outputs,
    check_plot,
    check_vector,
    existing_store,
    ingest_corpus,
    load,
    regrad_of,
    store_of,
    style_of,
    type_of,
    vector_names,
    warn_of_codec,
    whole_numbers,
    write_json,
)
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_loaders.data.folders import Question
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.stores.base import Store


def evaluation(
    qa: Annotated[
        Path,
        typer.Option(
            "--qa",
            help="qa.jsonl: one object a line with id, question and answers; or a file or folder of data_aug (.json), "
            "whose passages are the corpus.",
        ),
    ],
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", help="corpus.jsonl; a temporary bank is made of it, with atoms of what is retrieved."),
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Use this bank instead of a temporary one.")
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            help="Comma-separated: direct, rag, pe-rag (a stronger prompt), regrad, regrad+icl, online (atoms computed "
            "per query), random (atoms of documents that other questions found), init and init+icl (no atoms), "
            "raw (regrad without meta-training), ft-direct and ft-rag (fine-tuned), cpt, instruction-cpt and ft-cpt "
            "(continued pre-training), prag and ft-prag (an adapter a document), rag-kv and ft-rag-kv (passages as "
            "keys and values), ft-rag-64 and ft-rag-128 (cut to so many tokens); each but the -kv also as "
            "MODE/grounded, whose answers are spans of the retrieved texts, and as MODE/auto (the span or the free "
            "answer).",
        ),
    ] = "direct,rag,regrad,regrad+icl,random",
    split: Annotated[str | None, typer.Option("--split", help="Only questions of this split.")] = None,
    of_type: Annotated[str | None, typer.Option("--type", help="Only questions of this type.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N questions.")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Only N questions, drawn at random, the same every time.")
    ] = None,
    skip_sample: Annotated[
        list[int] | None,
        typer.Option("--skip-sample", min=1, help="None of those that --sample N draws; can be given again."),
    ] = None,
    top_k: TopK = 3,
    sweep: Annotated[
        str, typer.Option("--sweep", help="Further k, comma-separated: the modes that retrieve are asked with each.")
    ] = "",
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Answer from the gold passages instead of what is retrieved.")
    ] = False,
    retrieved: Annotated[
        bool,
        typer.Option(
            "--retrieved", help="Answer from the passages that data_aug names for each question, instead of a search."
        ),
    ] = False,
    style: AnswerStyle = "short",
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            help="How questions are put and scored: own, or paper: all answered freely in at most 20 tokens, yes and "
            "no found anywhere in the first line, choices as letters.",
        ),
    ] = "own",
    distractors: Annotated[
        int, typer.Option("--distractors", min=0, help="Random documents added to those of every question.")
    ] = 0,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Modes, comma-separated, that the others' F1 is compared with, question by question."
        ),
    ] = None,
    batch: Batch = 8,
    filter_field: Annotated[
        str | None,
        typer.Option("--filter-field", help="Search only passages that share the question's value of this field."),
    ] = None,
    id_field: Annotated[
        str | None,
        typer.Option("--id-field", help="Where payloads keep the id that gold_ids name, such as metadata.source."),
    ] = None,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    icl_init: Annotated[
        str | None,
        typer.Option(
            "--icl-init",
            help=f"Meta-initialization of the mode regrad+icl: {DEFAULT_ICL_INIT}, but with another --init, or a bank "
            "that exists, the same as --init.",
            show_default=False,
        ),
    ] = None,
    ft_direct: Annotated[
        str | None,
        typer.Option(
            "--ft-direct",
            help="Fine-tuned baseline of the mode ft-direct, no passages: by default the repository's own.",
            show_default=False,
        ),
    ] = None,
    ft_rag: Annotated[
        str | None,
        typer.Option(
            "--ft-rag",
            help="Fine-tuned baseline of the mode ft-rag, passages in the prompt: by default the repository's own.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    prompt_file: PromptFile = None,
    codec: CodecName = DEFAULT_CODEC,
    using: Using = None,
    dense: Dense = None,
    merge: Merge = None,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    text_path: TextPath = None,
    json_out: JsonOut = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", help="Write one JSON line an answer.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Keep the answers in this file as they are given; a run that was stopped goes on from it."
        ),
    ] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write a bar chart to this PNG or SVG file.")] = None,
) -> None:
    """Answer a question file in several modes, side by side, and score the answers."""
    from rich.filesize import decimal

    from regrad_loaders.baselines.parametric import CODEC as ADAPTERS_CODEC
    from regrad_loaders.data.augmented import read_augmented
    from regrad_loaders.data.folders import read_questions
    from regrad_loaders.evaluation.evaluate import evaluate
    from regrad_loaders.evaluation.journal import Journal, digest
    from regrad_loaders.evaluation.making import answerer_of, initialization_of, stored_of
    from regrad_loaders.evaluation.plan import (
        EVALUATION_MODES,
        FINE_TUNED,
        field_filter,
        parse_modes,
        parties,
        select,
    )
    from regrad_loaders.evaluation.plots import plot
    from regrad_loaders.evaluation.protocol import protocol_of
    from regrad_loaders.evaluation.results import write_predictions
    from regrad_loaders.evaluation.rounds import Rounds
    from regrad_qdrant.bank.corpus import read_corpus
    from regrad_qdrant.model.initialization import folder_of
    from regrad_qdrant.model.prompts import PromptFormat

    answer_style = style_of(style)
    chosen = parse_modes(modes, EVALUATION_MODES)
    further = [k for k in whole_numbers(sweep, "--sweep") if k != top_k]
    if further and oracle:
        raise DataError("--oracle answers from the gold passages, however many there are: leave --sweep out")
    if oracle and retrieved:
        raise DataError("give either --oracle or --retrieved")
    references = parse_modes(against, EVALUATION_MODES) if against else []
    if absent := [mode for mode in references if mode not in chosen]:
        raise DataError(f"--against {absent[0]}: it is not among the modes {', '.join(chosen)}")
    check_outputs(json_out, predictions, resume)
    check_plot(plot_out)
    if protocol not in ("own", "paper"):
        raise DataError(f"--protocol {protocol}: it is own or paper")
    augmented = read_augmented(qa) if qa.suffix == ".json" or qa.is_dir() else None
    asked_of = augmented.questions if augmented else read_questions(qa)
    questions = select(asked_of, split, limit, sample=sample, of_type=of_type, skip_samples=skip_sample or ())
    for question in questions:
        field_filter(question, filter_field)
    passages = read_corpus(corpus) if corpus is not None else augmented.passages if augmented else None
    if passages is None and collection is None:
        raise DataError("give --corpus FILE, or --collection NAME of a bank that exists")
    # A bank that exists holds the atoms of one initialization, and all modes read those.
    icl_init = icl_init or (DEFAULT_ICL_INIT if init == DEFAULT_INIT and collection is None else init)
    folders = {"ft-direct": ft_direct, "ft-rag": ft_rag}
    fine_tuned = {name: folders[name] or _baseline(name) for name in FINE_TUNED}
    answering = parties(chosen, init, icl_init, fine_tuned)
    settings: dict[str, Any] = {
        "command": "eval", "corpus": str(corpus) if corpus else None, "qa": str(qa), "split": split,
        "type": of_type, "limit": limit, "sample": sample, "skip_sample": skip_sample, "modes": chosen,
        "top_k": top_k, "oracle": oracle, "retrieved": retrieved, "distractors": distractors, "against": references,
        "using": "+".join(vector_names(using)), "dense": dense,
        "filter_field": filter_field, "id_field": id_field, "batch": batch, "collection": collection, "url": url,
        "path": str(path) if path else None, "payload_key": payload_key, "sidecar": sidecar, "init": init,
        "icl_init": icl_init, "ft_direct": fine_tuned["ft-direct"], "ft_rag": fine_tuned["ft-rag"], "sweep": further,
        "dtype": dtype, "style": style, "protocol": protocol, "prompt": str(prompt_file) if prompt_file else None,
    }  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def opened() -> Store:
            if collection is None:
                return store_of("eval", None, folder)
            return store_of(collection, url, path) if passages is not None else existing_store(collection, url, path)

        _check_search(opened(), using, dense)
        asking = None if prompt_file is None else PromptFormat.load(prompt_file)
        initialization, base, tokenizer = load(init, model, device, dtype)
        if any(party.fills and party.made is None for party in answering):
            warn_of_codec(codec, initialization)
        settings |= {"base_model": model or initialization.base.name, "space": initialization.fingerprint}
        if dtype == "auto":
            settings["dtype"] = type_of(base)
        journal = None
        if resume is not None:
            read = [file for file in (qa, corpus, prompt_file) if file is not None]
            read += [folder_of(name) for name in (init, icl_init, *fine_tuned.values()) if name is not None]
            further_settings = {
                "asked_codec": codec, "asked_merge": merge, "text_path": text_path, "device": device,
                "contents": [digest(file) for file in read],
            }  # fmt: skip
            journal = stack.enter_context(Journal(resume, settings | further_settings))
        report = None
        rounds = Rounds(questions, top_k, further, journal)
        asked_by = protocol_of(protocol == "paper", questions, asking or initialization.prompt)
        done = [party.made is not None and rounds.is_done(party) for party in answering]
        owners = [
            initialization
            if is_made or (party.init == init and party.made is None)
            else initialization_of(party, initialization, base, tokenizer, passages, questions, filter_field, progress)
            for party, is_made in zip(answering, done, strict=True)
        ]
        stored: dict[str, Any] = {}
        if journal is not None:
            stored = {mode: kept for mode, kept in journal.stored.items() if mode in chosen}
        with progress("Answering", rounds.count(chosen)) as advance:
            for party, ours, is_made in zip(answering, owners, done, strict=True):
                key = payload_key if party.fills else f"{payload_key}_{ours.fingerprint}_{party.made or 'own'}"
                on_missing = "store" if collection is None else "skip" if party.fills else "compute"
                with bank_of(opened(), ours, key, dense, text_path, using, sidecar, id_field) as bank:
                    is_new = collection is None and not bank.store.exists()
                    if is_new:
                        bank.create()
                    coded = ADAPTERS_CODEC if party.made == "prag" else codec
                    regrad = regrad_of(
                        base, tokenizer, bank, ours, merge, on_missing=on_missing, codec=coded, prompt=asking
                    )
                    answerer = regrad if is_made else answerer_of(party, regrad, progress)
                    if is_new and passages is not None:
                        add_passages(bank, passages)  # their atoms are computed when they are retrieved
                    elif passages is not None and collection is not None and party.fills:
                        report = ingest_corpus(regrad, passages, codec)
                    _check_filter(bank, questions[0], filter_field)
                    ask = functools.partial(
                        evaluate, answerer, questions, using=using, filter_field=filter_field, oracle=oracle,
                        retrieved=retrieved, distractors=distractors, batch=batch, style=answer_style,
                        protocol=asked_by,
                    )  # fmt: skip
                    rounds.ask(party, ask, advance)
                    settings |= {"layout": str(bank.layout)}
                    if party.fills:
                        settings |= {"codec": bank.status().codec or codec, "merge": asdict(regrad.weighing.merge)}
                    if (kept := stored_of(answerer)) is not None:
                        stored |= dict.fromkeys(party.modes.values(), kept)
                        for mode in party.modes.values() if journal is not None else ():
                            journal.keep(mode, kept)
                    regrad.close()
    result = rounds.result(settings, chosen, references, stored)
    console.print(scores_table(result))
    for mode, kept in stored.items():
        console.print(
            f"{mode}: {kept.documents} documents, {decimal(kept.bytes)} and {kept.seconds:.2f} s each to make",
            markup=False,
        )
    if result.sweep:
        console.print(sweep_table(result))
    if references:
        console.print(differences_table(result))
    if report is not None:
        print_report(report)
    if predictions:
        write_predictions(result, predictions)
    write_json(json_out, result.as_dict())
    if plot_out is not None:
        plot(result, plot_out)


def _check_filter(bank: GradientBank, question: Question, field: str | None) -> None:
    """Refuse a field that no passage has: every search would find nothing."""
    from regrad_loaders.evaluation.plan import field_filter

    only = field_filter(question, field)
    if only is not None and bank.store.count() and bank.absent_fields(only):
        raise DataError(f"--filter-field {field}: no passage has that field (dots descend into objects)")


def _check_search(store: Store, using: list[str] | None, dense: str | None) -> None:
    """Refuse a vector that nothing makes, before the model is loaded; closes the store."""
    try:
        if store.exists():
            check_vector(store, using)
        elif vector_names(using) != ["bm25"] and dense is None:
            raise DataError(f"nothing makes the vector {using!r}: give --dense MODEL, or leave --using out")
    finally:
        store.close()


def _baseline(mode: str) -> str | None:
    """The fine-tuned adapter of a mode that stands in the repository, where this is run from a clone of it."""
    folder = Path(__file__).parents[3] / "benchmarks" / "baselines" / mode
    return os.path.relpath(folder) if folder.is_dir() else None
