"""What of vLLM our plugin meets, over the tiny model: an engine client that loads LoRAs by our worker's half."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch
from conftest import tiny_initialization, tiny_model

from regrad_qdrant.model.identity import PEFT_PREFIX
from regrad_qdrant.model.plugin import lora_layers, lora_weight, plug_in
from regrad_qdrant.serve.vllm.worker import lora_of


class LoRARequest(SimpleNamespace):
    def __init__(self, lora_name, lora_int_id, lora_path):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class LoRAModel(SimpleNamespace):
    @classmethod
    def from_lora_tensors(cls, lora_model_id, tensors, peft_helper, device, dtype, **_):
        return cls(id=lora_model_id, tensors=tensors, helper=peft_helper, dtype=dtype)


class PEFTHelper(SimpleNamespace):
    @classmethod
    def from_dict(cls, config):
        return cls(**config)

    def validate_legal(self, lora_config):
        if self.r > lora_config.max_lora_rank:
            raise ValueError(f"LoRA rank {self.r} is greater than max_lora_rank {lora_config.max_lora_rank}")


class WorkerLoRAManager:
    """vLLM's, as far as our half of the worker reads it."""

    def __init__(self, max_lora_rank=16):
        self.lora_config = SimpleNamespace(max_lora_rank=max_lora_rank, lora_dtype=torch.float32)
        self._adapter_manager = SimpleNamespace(model=object())
        self._lora_model_cls = LoRAModel
        self.vocab_size = 640

    def _load_adapter(self, request):
        raise FileNotFoundError(request.lora_path)


def modules():
    """vLLM's modules, as `sys.modules` takes them."""
    made = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(DELTA="delta"),
            "StructuredOutputsParams": SimpleNamespace,
        },
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.peft_helper": {"PEFTHelper": PEFTHelper},
        "vllm.lora.worker_manager": {"WorkerLoRAManager": WorkerLoRAManager},
    }
    found = {}
    for name, content in made.items():
        found[name] = ModuleType(name)
        found[name].__dict__.update(content)
    return found


class FakeClient:
    """vLLM's `EngineClient`: greedy answers of the tiny model, each with its LoRA's tensors in its layers."""

    errored = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.model = plug_in(tiny_model(), tiny_initialization(tiny_model()))
        self.manager = WorkerLoRAManager()
        self.loras, self.running, self.params = {}, 0, []
        self.model_config = SimpleNamespace(try_get_generation_config=lambda: {"eos_token_id": [2]})

    def get_tokenizer(self):
        return self.tokenizer

    async def add_lora(self, request):
        self.loras[request.lora_int_id] = lora_of(self.manager, request)
        return True

    async def generate(self, prompt, params, request_id, *, lora_request=None):
        self.running += 1
        self.params.append(params)
        try:
            ids = list(prompt["prompt_token_ids"])
            for i in range(params.max_tokens):
                logits = self._logits(ids, lora_request)
                token = int(logits.argmax())
                ids.append(token)
                wanted = getattr(params, "logprob_token_ids", ())
                logprobs = [{t: SimpleNamespace(logprob=float(logits.log_softmax(0)[t])) for t in (*wanted, token)}]
                done = token in getattr(params, "stop_token_ids", [2]) or i + 1 == params.max_tokens
                said = SimpleNamespace(token_ids=[token], logprobs=logprobs, finish_reason="stop" if done else None)
                yield SimpleNamespace(outputs=[said], finished=done)
                if done:
                    return
        finally:
            self.running -= 1

    def _logits(self, ids, lora_request):
        layers = lora_layers(self.model)
        tensors = {} if lora_request is None else self.loras[lora_request.lora_int_id].tensors
        with torch.no_grad():
            for name, layer in layers.items():
                for part in ("lora_A", "lora_B"):
                    weight = lora_weight(layer, part)
                    weight.copy_(tensors.get(f"{PEFT_PREFIX}{name}.{part}.weight", torch.zeros_like(weight)))
            return self.model.get_base_model()(torch.tensor([ids])).logits[0, -1].float()


def install(monkeypatch):
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
