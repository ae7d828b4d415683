"""A base model whose weights several processes hold together."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import COMMANDS, TINY, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from regrad_loaders.training.recipe import Recipe, Source
from regrad_loaders.training.sharded import ShardedLinear, Share, share_weights
from regrad_loaders.training.trainer import Trainer
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization

RECIPE = Recipe(
    name="tiny",
    base_model="tiny",
    space="core",
    rank=4,
    basis_rank=4,
    lora_alpha=8,
    targets=("gate_proj", "up_proj", "down_proj", "q_proj"),
    layers=(1, 2),
    max_length=64,
    step_size=0.5,
    data=(Source(1.0, facts={"people": 20, "seed": 3}),),
    passages=4,
    questions_per_passage=2,
    passage_batch=2,
    top_k=(1, 2),
    steps=3,
    warmup=1,
    learning_rate=3e-3,
    seed=5,
)


def uneven_model() -> LlamaForCausalLM:
    """Rows that two processes can't halve, and biases."""
    torch.manual_seed(0)
    config = LlamaConfig(**TINY | {"intermediate_size": 95, "attention_bias": True, "mlp_bias": True})
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
    return model


CASES = {"core": ("core", False), "lora": ("lora", False), "core-bf16": ("core", True)}  # space, autocast


@pytest.fixture(scope="module")
def together(tokenizer, tmp_path_factory):
    """The folder of what two processes learned that hold one model together, each case in a folder of its name."""
    folder = tmp_path_factory.mktemp("together")
    uneven_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, (kind, autocast) in CASES.items():
        settings = asdict(replace(RECIPE, base_model=str(folder / "model"), space=kind, autocast=autocast, shards=2))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    (folder / "commands.py").write_text(COMMANDS)
    trainings = [["train", "--recipe", f"{name}.yaml", "--out", name] for name in CASES]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "commands.py", json.dumps(trainings)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_processes_that_hold_one_model_together_learn_as_one_that_has_it_whole(together, tokenizer, tmp_path, case):
    """Two processes with half of every weight: first and second order through products of rows in both."""
    kind, autocast = CASES[case]
    recipe = replace(RECIPE, base_model=str(together / "model"), space=kind, autocast=autocast)
    shared = MetaInitialization.load(together / case / "initialization")
    assert shared.card["steps"] == 3
    model = uneven_model()
    whole = Trainer(recipe, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path)
    begun = whole.made()
    for _ in range(3):
        whole.train_step()
    made = whole.made()
    learned, here, first = (flat(one) for one in (shared, made, begun))
    assert (here - first).norm() > 0.1
    if autocast:  # bf16 rounds sums of parts in another place, and Adam makes the smallest gradients large
        assert (learned - here).norm() < 0.2 * (here - first).norm()
    else:
        assert_close(learned, here, rtol=1e-3, atol=1e-5)


def flat(made: MetaInitialization) -> torch.Tensor:
    parts = [getattr(module, part) for module in made.modules.values() for part in ("lora_a", "lora_b", "basis")]
    return torch.cat([part.flatten() for part in parts if part is not None])


def test_groups_have_all_processes():
    with pytest.raises(DataError, match="3 processes can't hold base models 2 at a time: shards must divide"):
        Share(0, 3, 2)


class Half:
    """The first of two processes, as far as taking rows goes."""

    size, number = 2, 0
    of = Share.of


def test_each_holds_its_rows_alone():
    model = tiny_model()
    whole = model.model.layers[0].mlp.down_proj.weight.clone()
    before = sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, nn.Linear))
    share_weights(model, Half())
    layers = [layer for layer in model.model.modules() if isinstance(layer, nn.Linear)]
    assert all(isinstance(layer, ShardedLinear) for layer in layers)
    assert sum(layer.weight.numel() for layer in layers) == before / 2
    assert sum(layer.weight.untyped_storage().nbytes() for layer in layers) == 4 * before / 2
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, whole[: len(whole) // 2])
    assert type(model.get_output_embeddings()) is nn.Linear


def test_layers_of_another_kind_are_refused():
    class Quantized(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Quantized(4, 4)
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj is a Quantized: shards are of weights in 16"):
        share_weights(model, Half())
