"""Several devices at once, on tensors that only know where they are: no accelerator is needed to find a mix-up."""

import pytest
import torch
from conftest import tiny_initialization, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from regrad_loaders.training import start
from regrad_loaders.training.narrow import narrow
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model import plugin
from regrad_qdrant.model.base_model import load_base_model
from regrad_qdrant.model.identity import BaseModel

FIRST, SECOND = "cpu:1", "cpu:2"  # of a type that every PyTorch is linked with, and told apart all the same


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(plugin, "check_layers", lambda *_: None)  # it looks at numbers, which there are none of
    monkeypatch.setattr(BaseModel, "of", lambda _model, name: BaseModel(name, "0" * 16))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where, **_: moved_to(self, where[0]) if where else self)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def moved_to(module, device):
    """As `module.to` does with real tensors: they stay the same objects."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.fake_device = torch.device(device)
    return module


def spread(model):
    """The embedding and the first layers on one device, the last layer and what follows on another."""

    def follows(module, device):
        moved_to(module, device)

        def moved(_module, args, kwargs):
            def move(value):
                if isinstance(value, torch.Tensor):
                    return value.to(device)
                return tuple(map(move, value)) if isinstance(value, tuple) else value

            return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

        module.register_forward_pre_hook(moved, with_kwargs=True)

    follows(model.model.embed_tokens, FIRST)
    moved_to(model.model.rotary_emb, FIRST)
    for layer, device in zip(model.model.layers, (FIRST, FIRST, SECOND), strict=True):
        follows(layer, device)
    follows(model.model.norm, SECOND)
    follows(model.lm_head, SECOND)
    return model


def where(model):
    return {name: str(p.device) for name, p in model.named_parameters() if "layers" in name}


@pytest.mark.parametrize("kind", ["lora", "core", "tied", "values"])
def test_a_model_on_two_devices_takes_an_update_in_its_weights_and_row_by_row(fake, kind):
    model = tiny_model()
    adapter = Adapter(model, tiny_initialization(model, kind), check_model=False)
    spread(model)
    with adapter.initial():
        homes = {name: p.device for name, p in adapter._parameters.items()}
    assert {str(device) for device in homes.values()} == {FIRST, SECOND}
    ids = torch.ones(2, 5, dtype=torch.long, device=FIRST)
    atom = torch.zeros(adapter.space.numel, device=FIRST)
    with adapter.applied_sum(atom):
        assert str(adapter.model(input_ids=ids, use_cache=False).logits.device) == SECOND
    with adapter.rows([atom, None], [False, True]):
        assert str(adapter.model(input_ids=ids, use_cache=False).logits.device) == SECOND
    assert {name: p.device for name, p in adapter._parameters.items()} == homes


def test_a_model_that_moves_takes_its_plug_in_along(fake):
    model = tiny_model()
    adapter = Adapter(model, tiny_initialization(model), check_model=False)
    moved_to(model, SECOND)  # the caller's own, while the plug-in is out of it
    with adapter.initial():
        assert set(where(adapter.model).values()) == {SECOND}
        assert (
            str(
                adapter.model(
                    input_ids=torch.ones(1, 4, dtype=torch.long, device=SECOND), use_cache=False
                ).logits.device
            )
            == SECOND
        )


def test_a_fresh_start_of_a_model_on_an_accelerator_is_on_the_processor_and_narrows_there(fake):
    model = moved_to(tiny_model(), FIRST)
    modules = start.adapted_layers(model, ["gate_proj"], [1, 2])
    assert {str(start.plain_weight(linear).device) for linear in modules.values()} == {"cpu"}
    made = tiny_initialization(model, targets=["gate_proj"])
    assert {str(m.lora_a.device) for m in made.modules.values()} == {"cpu"}
    smaller = narrow(made, torch.randn(8, made.space.numel), rank=2, basis_rank=2, modules=list(made.modules))
    assert {str(m.lora_a.device) for m in smaller.modules.values()} == {"cpu"}


def test_a_device_that_is_not_there_is_refused_by_its_name():
    for device, message in (("cuda:7", "this machine"), ("gpu", "none that PyTorch knows")):
        with pytest.raises(InitializationError, match=message):
            load_base_model("anything", device=device)
    with pytest.raises(InitializationError, match="not one of auto, float32"):
        load_base_model("anything", dtype="int3")
