"""A checkpoint written in the layout of the authors' code: names from a PEFT model's own parameters."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from qdrant_client import QdrantClient

from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.released_checkpoint import codec_changes, dropout_of, read
from regrad_qdrant import Adapter, Document, GradientBank, MergeRule, ReGrad
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.cli import app as cli
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.prompts import PromptFormat

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


def test_rank_stabilized_negative_and_dropped_inputs_come_along(tmp_path, tokenizer):
    """What the released code can learn, ours must load again, train on from, and speak of."""
    theirs, state = written(tmp_path, use_rslora=True, lora_dropout=0.05)
    for name in [key for key in state if key.startswith("alpha_")][::2]:
        state[name] = torch.nn.Parameter(-state[name].detach())
    torch.save(state, tmp_path / "meta_state_dict.pth")
    model = tiny_model()
    initialization = read(tmp_path, BaseModel.of(model, "tiny"))
    initialization.save(tmp_path / "ours")
    again = MetaInitialization.load(tmp_path / "ours")
    with Adapter(model, again).initial(), torch.no_grad():
        found = model(torch.arange(3, 20).unsqueeze(0)).logits
    for layer in (module for module in theirs.modules() if isinstance(getattr(module, "scaling", None), dict)):
        layer.scaling["default"] = 4.0
    torch.testing.assert_close(found, theirs(torch.arange(3, 20).unsqueeze(0)).logits, rtol=0, atol=1e-5)
    model = tiny_model()
    assert again.fingerprint == initialization.fingerprint and again.rank_stabilized
    assert next(iter(again.modules.values())).scaling == pytest.approx(8 / 2)  # α / √r
    learner = MetaLearner(model, again, "sum")
    sizes = [float(size.detach()) for size in learner.step_sizes().values()]
    assert min(sizes) < 0 < max(sizes)
    assert sizes == pytest.approx(list(map(float, again.step_sizes.values())))
    learner.model[0].unload()
    assert dropout_of(tmp_path) == 0.05
    changes = codec_changes(again, model, tokenizer, ["Ida works as a baker.", "Noor is a diver."])
    assert changes["fp32"] < 1e-6 < changes["int8"] < 0.05 < changes["sign"]
    assert again.trained_codecs == ("fp32",)


def test_under_its_own_prompt_its_answers_are_those_of_its_own_code_one_for_one(tmp_path, tokenizer):
    """The whole query by hand: their prompt, their sum of gradients, plain PEFT and greedy tokens."""
    theirs, state = written(tmp_path)
    own = {
        "system": {"open": ""}, "system_with_passages": {"open": ""}, "user": "Q: {question}{choices}",
        "user_with_passages": "{passages} || Q: {question}", "passage": "[{number}] {text}", "answer": "A:",
    }  # fmt: skip
    (tmp_path / "prompt.json").write_text(json.dumps(own))
    model = tiny_model()
    initialization = replace(
        read(tmp_path, BaseModel.of(model, "tiny")), prompt=PromptFormat.load(tmp_path / "prompt.json")
    )
    texts = ["Ida Corvand works as a baker in Aalborg.", "Noor Vasky is a diver.", "Orla Finch plays the harp."]
    with GradientBank(QdrantClient(":memory:"), "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(texts))
        regrad = ReGrad(model, tokenizer, bank, initialization, merge=MergeRule("sum"))
        attach_atoms(bank, regrad.gradients, "fp32")
        for question in ("Who is Ida Corvand?", "What does Noor Vasky do?"):
            for mode in ("regrad", "regrad+icl"):
                answer = regrad.answer(question, mode=mode, top_k=2, max_new_tokens=8)
                shares = [answer.weights[hit.id] for hit in answer.hits]
                passages = [hit.text for hit in answer.hits]
                shown = "\n".join(f"[{i}] {text}" for i, text in enumerate(passages, 1))
                asked = f"Q: {question}" if mode == "regrad" else f"{shown} || Q: {question}"
                prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\nA:"
                assert answer.text == by_hand(theirs, state, tokenizer, passages, shares, prompt)


def by_hand(theirs, state, tokenizer, passages, shares, prompt):
    named = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    before = {name: p.detach().clone() for name, p in named.items()}
    change = {name: torch.zeros_like(p) for name, p in named.items()}
    for text, share in zip(passages, shares, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        grads = torch.autograd.grad(
            theirs(input_ids=ids, labels=ids).loss, [p.requires_grad_() for p in named.values()]
        )
        for name, grad in zip(named, grads, strict=True):
            change[name] -= (
                share * state[f"alpha_base_model-{name.removeprefix('base_model.').replace('.', '-')}"].detach() * grad
            )
    for name, parameter in named.items():
        parameter.data = before[name] + change[name]
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    said = theirs.generate(input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=2)[0, ids.shape[1] :]
    for name, parameter in named.items():
        parameter.data = before[name]
    return tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0].strip()
