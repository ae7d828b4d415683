"""The commands that make initializations: `regrad-qdrant train` and `regrad-qdrant import-checkpoint`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from regrad_loaders.training.estimate import GPUS
from regrad_qdrant.cli.console import console, errors, progress
from regrad_qdrant.cli.options import DEFAULT_INIT, Device, Dtype
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_loaders.training.recipe import Recipe

CODED_TEXTS = 8  # whose atoms say which codec an imported initialization stands
SAFE = 0.05  # change of an update by a codec, relative to its length


def train(
    recipe: Annotated[Path, typer.Option("--recipe", help="YAML file that says everything about the run.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; runs/<recipe's name> by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder of the data, instead of the recipe's.")
    ] = None,
    refit_step_sizes: Annotated[
        bool,
        typer.Option(
            "--refit-step-sizes",
            help="Learn the step sizes and the merge temperature of --init alone, through the recipe's codecs: every "
            "stored atom stays valid.",
        ),
    ] = False,
    init: Annotated[
        str | None, typer.Option("--init", help="Go on from this initialization instead of the recipe's `start`.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Another model than the recipe's; the recipes lora and core are for any."),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Say what it would take on --gpu, by the model's configuration."),
    ] = False,
    gpu: Annotated[str, typer.Option("--gpu", help=f"Of --estimate: {', '.join(GPUS)}.")] = "h100",
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus",
            min=1,
            help="Of --estimate: how many; more than the recipe's shards draw episodes of their own, in as much time.",
        ),
    ] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Meta-train an initialization for a base model: the gradients' own learning to be useful."""
    from dataclasses import replace

    import torch

    from regrad_loaders.training.recipe import Recipe
    from regrad_loaders.training.trainer import run
    from regrad_qdrant.model.base_model import load_base_model, load_config
    from regrad_qdrant.model.identity import BaseModel

    settings = Recipe.load(recipe)
    if base_model is not None:
        settings = settings.of_model(base_model)
    if data_dir is not None:
        settings = replace(settings, data_dir=str(data_dir))
    if init is not None:
        settings = replace(settings, start=init, averaged_with=None)
    if refit_step_sizes:
        settings = replace(settings, start=settings.start or DEFAULT_INIT, learn="step_sizes")
    settings = settings.fitted_to(load_config(settings.base_model))
    if estimate:
        _tell(settings, gpu, gpus)
        return
    folder = out or Path("runs") / settings.name
    if (folder / "checkpoint.pt").exists() and not resume:
        raise DataError(f"{folder} holds a checkpoint: go on from it with --resume, or choose another --out")
    console.quiet = errors.quiet = os.environ.get("RANK", "0") != "0"  # the first of several processes speaks
    if resume and not (folder / "checkpoint.pt").exists():
        console.print(f"{folder} holds no checkpoint: the run starts anew", highlight=False, markup=False)
    for name, value in settings.as_dict().items():
        console.print(f"  {name:<24} {value}", highlight=False, markup=False)
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # each process loads it to its own
    shared = settings.shards > 1  # each process takes its rows of what it has read
    with console.status("Loading the base model"):
        model, tokenizer = load_base_model(
            settings.base_model, device=device, dtype=dtype, **({"device_map": "cpu"} if shared else {})
        )
    base = BaseModel.of(model, settings.base_model)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    with progress("Training", settings.steps) as advance:
        initialization = run(
            settings,
            model,
            tokenizer,
            base,
            folder,
            resume=resume,
            on_processor=not device.startswith("cuda") if shared else None,
            on_step=advance,
            say=say,
        )
    console.print(
        f"{folder / 'initialization'}: space {initialization.fingerprint}, {initialization.space.numel} numbers an atom"
    )


def _tell(settings: Recipe, gpu: str, gpus: int) -> None:
    """What a run would take."""
    from regrad_loaders.training.estimate import EFFICIENCY
    from regrad_loaders.training.estimate import estimate as estimated
    from regrad_qdrant.model.base_model import load_config

    found = estimated(settings, load_config(settings.base_model), gpu, gpus)
    batch = f"{found.passage_batch} of {settings.passages}" if found.fits else "not one fits: take a larger GPU"
    rows = {
        "parameters": f"{found.parameters / 1e9:.2f} B",
        "adapted layers": str(found.adapted),
        "numbers of an atom": f"{found.atom:,}",
        "numbers to learn": f"{found.learned / 1e6:.1f} M",
        "weights": decimal(int(found.weights)),
        "learned, with Adam": decimal(int(found.optimizer)),
        "graph of one passage": decimal(int(found.of_passage)),
        "graph of a batch of questions": decimal(int(found.of_answers)),
        "passage_batch": batch,
        "memory at its peak": decimal(int(found.peak)),
        "work of a step": f"{found.flops / 1e12:.1f} TFLOP",
        "a step": f"{found.seconds:.2f} s",
        f"{settings.steps} steps": f"{found.hours:.1f} h" if found.hours >= 1 else f"{60 * found.hours:.1f} min",
    }
    for name, value in rows.items():
        console.print(f"  {name:<30} {value}", highlight=False, markup=False)
    console.print(
        f"Arithmetic for {gpus} × {gpu} at {EFFICIENCY:.0%} of its peak, which models below a billion "
        "parameters don't reach: theirs can take ten times as long and more. Set passage_batch in the recipe.",
        highlight=False,
    )


def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with peft_config.json, learner_config.json and meta_state_dict.pth.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the initialization to.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Base model, instead of the one that learner_config.json names.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens of a document at ingestion.")] = 2048,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt", help="JSON file of the prompt that it was trained with.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Convert a checkpoint of the ReGrad authors' released code into an initialization."""
    from dataclasses import replace

    from regrad_loaders.data.facts import generate
    from regrad_loaders.training.released_checkpoint import base_model_of, codec_changes, dropout_of, read
    from regrad_qdrant.model.base_model import load_base_model
    from regrad_qdrant.model.identity import BaseModel
    from regrad_qdrant.model.prompts import PromptFormat

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise DataError(f"{out} is not empty: choose another --out")
    name = model or base_model_of(checkpoint)
    with console.status(f"Loading {name}"):
        base, tokenizer = load_base_model(name, device=device, dtype=dtype)
    initialization = read(checkpoint, BaseModel.of(base, name), max_length=max_length)
    if prompt_file is not None:
        initialization = replace(initialization, prompt=PromptFormat.load(prompt_file))
    with console.status("Trying the codecs"):
        texts = [passage.text for passage in generate("demo", CODED_TEXTS, 1).passages]
        changes = codec_changes(initialization, base, tokenizer, texts)
    initialization.save(out)
    shown = ", ".join(f"{codec} {100 * change:.1f} %" for codec, change in changes.items())
    safe = next((codec for codec, change in reversed(changes.items()) if change <= SAFE), "fp32")
    console.print(f"its updates change by codec: {shown}. Ingest with --codec {safe}", highlight=False)
    if dropout := dropout_of(checkpoint):
        console.print(f"lora_dropout {dropout} of its training is not used: here nothing is dropped", highlight=False)
    if prompt_file is None:
        console.print(
            "It answers best to the prompt that it was trained with: give that with --prompt FILE", highlight=False
        )
    console.print(f"{out}: space {initialization.fingerprint}, {initialization.space.numel} numbers an atom")
