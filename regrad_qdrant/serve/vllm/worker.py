"""The half that runs in vLLM's worker: a LoRA whose path carries atoms is merged in memory, from no file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import RecordError
from regrad_qdrant.serve.vllm.packed import SCHEME, PackedUpdate
from regrad_qdrant.serve.vllm.settings import COLLECTION, Settings

if TYPE_CHECKING:
    from regrad_qdrant.model.initialization import MetaInitialization

Load = Callable[[Any, Any], Any]  # of vLLM's WorkerLoRAManager and a LoRARequest, the LoRAModel


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in each of its processes, some several times. Where no
    collection is named, vLLM stays as it is."""
    if not os.environ.get(COLLECTION):
        return
    from vllm.lora.worker_manager import WorkerLoRAManager

    if not hasattr(WorkerLoRAManager._load_adapter, "__wrapped__"):
        WorkerLoRAManager._load_adapter = loading(WorkerLoRAManager._load_adapter)


def loading(load: Load) -> Load:
    """vLLM's own loading of a LoRA, and ours for paths of our scheme."""

    @functools.wraps(load)
    def load_adapter(manager: Any, request: Any) -> Any:
        return lora_of(manager, request) if request.lora_path.startswith(SCHEME) else load(manager, request)

    return load_adapter


def lora_of(manager: Any, request: Any) -> Any:
    """The LoRA of an update, with what vLLM's own loading gives to one from files.

    Raises:
        RecordError: if the update can't be used.
    """
    from vllm.lora.peft_helper import PEFTHelper

    update = PackedUpdate.read(request.lora_path)
    initialization = _initialization(update.space)
    helper = PEFTHelper.from_dict(initialization.peft_config())
    helper.validate_legal(manager.lora_config)
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=request.lora_int_id,
        tensors=update.tensors(initialization),
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    lora.is_3d_lora_weight = False
    return lora


@functools.cache
def _initialization(space: str) -> MetaInitialization:
    """The initialization of a space, among those that the environment names."""
    from regrad_qdrant.model.initialization import MetaInitialization

    known = {made.fingerprint: made for made in map(MetaInitialization.load, Settings.of().initializations)}
    if space not in known:
        raise RecordError(f"the update is of space {space}, this worker's initializations are {', '.join(known)}")
    return known[space]
