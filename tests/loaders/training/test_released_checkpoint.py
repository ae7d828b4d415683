"""A checkpoint written in the layout of the authors' code: names from a PEFT model's own parameters."""

import json
import sys

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from regrad_loaders.training.released_checkpoint import read
from regrad_qdrant import Adapter
from regrad_qdrant.cli import app as cli
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def written(folder, mode="tie", **peft):
    """The three files, and the PEFT model that they were written from."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "layers_to_transform": [1, 2]}
    model = get_peft_model(tiny_model(), LoraConfig(**settings))
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.nn.init.normal_(parameter, std=0.1)
        state[f"base_model.{name}"] = parameter
        size = torch.full_like(parameter, 0.03) if mode == "full" else torch.tensor(0.01 * (1 + len(state)))
        if mode in ("tie", "full"):
            state[f"alpha_{name.replace('.', '-')}"] = torch.nn.Parameter(size)
    if mode == "same":
        state["alpha"] = torch.nn.Parameter(torch.tensor(0.02))
    torch.save(state, folder / "meta_state_dict.pth")
    (folder / "peft_config.json").write_text(json.dumps({"peft_type": "LORA", **settings, **peft}))
    (folder / "learner_config.json").write_text(json.dumps({"alpha_mode": mode, "init_alpha": 0.04}))
    return model, state


def test_the_model_runs_as_the_authors_would_run_it(tmp_path, tokenizer):
    theirs, state = written(tmp_path)
    model = tiny_model()
    initialization = read(tmp_path, BaseModel.of(model, "tiny"))
    adapter = Adapter(model, initialization)
    ids = torch.arange(3, 20).unsqueeze(0)
    with adapter.initial(), torch.no_grad():
        found = adapter.model(ids).logits
    torch.testing.assert_close(found, theirs(ids).logits, rtol=0, atol=1e-6)
    assert initialization.merge.rule == "sum" and initialization.space.kind == "lora"
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
    name = "model.layers.2.mlp.down_proj.lora_B"
    assert initialization.step_sizes[name] == pytest.approx(state[f"alpha_{key.replace('.', '-')}"].item())


def test_it_is_saved_as_one_of_ours(tmp_path):
    written(tmp_path)
    initialization = read(tmp_path, BaseModel.of(tiny_model(), "tiny"))
    initialization.save(tmp_path / "ours")
    assert MetaInitialization.load(tmp_path / "ours").fingerprint == initialization.fingerprint


@pytest.mark.parametrize(("mode", "size"), [("same", 0.02), ("fix", 0.04)])
def test_one_step_size_for_all(tmp_path, mode, size):
    written(tmp_path, mode)
    sizes = read(tmp_path, BaseModel.of(tiny_model(), "tiny")).step_sizes
    assert all(found == pytest.approx(size) for found in sizes.values())


def test_a_step_size_for_every_number(tmp_path):
    _, state = written(tmp_path, "full")
    initialization = read(tmp_path, BaseModel.of(tiny_model(), "tiny"))
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
    expected = state[f"alpha_{key.replace('.', '-')}"]
    assert torch.equal(initialization.step_sizes["model.layers.2.mlp.down_proj.lora_B"], expected)
    initialization.save(tmp_path / "ours")
    again = MetaInitialization.load(tmp_path / "ours")
    assert torch.equal(again.flat_step_sizes(), initialization.flat_step_sizes())


def test_the_command_writes_an_initialization(tmp_path, tokenizer, monkeypatch, capsys):
    written(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["import-checkpoint", str(tmp_path), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "ours")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["regrad-qdrant", *command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
    loaded = MetaInitialization.load(tmp_path / "ours")
    assert loaded.fingerprint == read(tmp_path, loaded.base).fingerprint


def test_what_can_not_be_imported_is_refused(tmp_path):
    base = BaseModel.of(tiny_model(), "tiny")
    with pytest.raises(InitializationError, match="peft_config.json"):
        read(tmp_path, base)
    written(tmp_path, use_dora=True)
    with pytest.raises(InitializationError, match="plain LoRA"):
        read(tmp_path, base)
    written(tmp_path, r=8)
    with pytest.raises(InitializationError, match="has rank 4, peft_config.json says 8"):
        read(tmp_path, base)
    torch.save({"alpha": torch.tensor(0.1)}, tmp_path / "meta_state_dict.pth")
    with pytest.raises(InitializationError, match="no LoRA tensors"):
        read(tmp_path, base)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("it ran",))

    written(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "meta_state_dict.pth")
    with pytest.raises(InitializationError, match="tensors alone"):
        read(tmp_path, BaseModel.of(tiny_model(), "tiny"))
