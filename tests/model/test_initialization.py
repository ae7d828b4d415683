import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_initialization, tiny_model
from peft import PeftModel
from safetensors.torch import load_file

from regrad_loaders.training.start import fresh
from regrad_qdrant import Adapter, MetaInitialization
from regrad_qdrant.atoms.merge import MergeRule
from regrad_qdrant.errors import AdapterError, InitializationError, WrongModelError
from regrad_qdrant.model.identity import BaseModel, weights_digest
from regrad_qdrant.model.initialization import in_bytes


def changed(initialization, part, **of_module):
    """The same initialization with one number of one tensor changed."""
    name = next(iter(initialization.modules))
    tensor = getattr(initialization.modules[name], part).clone()
    tensor[0, 0] += 1e-3
    modules = dict(initialization.modules)
    modules[name] = replace(modules[name], **{part: tensor})
    return replace(initialization, modules=modules)


def test_saves_and_loads_itself(initialization, kind, model, tmp_path):
    initialization = replace(
        tiny_initialization(model, kind), merge=MergeRule("softmax", 0.3), card={"seed": 4}, passages_in_prompt=True
    )
    initialization.save(tmp_path)
    again = MetaInitialization.load(tmp_path)
    assert again.fingerprint == initialization.fingerprint
    assert again.step_sizes == pytest.approx(initialization.step_sizes)
    assert (again.merge, again.card, again.passages_in_prompt) == (MergeRule("softmax", 0.3), {"seed": 4}, True)


def test_peft_reads_the_folder_without_this_library(initialization, model, tmp_path):
    initialization.save(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path)
    ours = Adapter(model, initialization)
    ids = torch.arange(3, 20).unsqueeze(0)
    with ours.initial():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits)
    plain = tiny_model()(input_ids=ids).logits
    assert not torch.allclose(theirs(input_ids=ids).logits, plain)


def test_the_fingerprint_changes_with_each_thing_a_gradient_depends_on(initialization, model):
    other_model = tiny_model()
    other_model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.1
    other_config = tiny_model()
    other_config.config.rms_norm_eps = 0.5
    variants = {
        "as it is": initialization,
        "one base weight": replace(initialization, base=BaseModel.of(other_model, "tiny")),
        "a base setting": replace(initialization, base=BaseModel.of(other_config, "tiny")),
        "one number of A": changed(initialization, "lora_a"),
        "one number of B": changed(initialization, "lora_b"),
        "one number of U": changed(initialization, "basis"),
        "max_length": replace(initialization, max_length=65),
        "the space": tiny_initialization(model, "lora"),
        "the layers": tiny_initialization(model, layers=[2]),
        "the scaling": tiny_initialization(model, lora_alpha=16),
    }
    prints = {name: variant.fingerprint for name, variant in variants.items()}
    assert len(set(prints.values())) == len(prints), prints
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


def test_step_sizes_and_merge_rule_are_no_part_of_the_fingerprint(initialization):
    doubled = initialization.with_step_sizes(
        {name: 2 * size for name, size in initialization.step_sizes.items()}, MergeRule("top1")
    )
    assert doubled.fingerprint == initialization.fingerprint
    assert replace(initialization, card={"note": "x"}).fingerprint == initialization.fingerprint


def test_the_digest_is_that_of_the_plain_model_in_any_float_type(initialization, model):
    before = weights_digest(model)
    adapter = Adapter(model, initialization)
    with adapter.initial():
        assert weights_digest(adapter.model) == weights_digest(adapter.model.get_base_model()) == before
    rounded = tiny_model().to(torch.bfloat16)
    assert weights_digest(rounded) == before == weights_digest(tiny_model().to(torch.bfloat16).float())


def test_another_model_is_refused_with_both_digests(initialization):
    other = tiny_model(seed=1)
    with pytest.raises(WrongModelError, match=weights_digest(other)) as caught:
        Adapter(other, initialization)
    assert initialization.base.digest in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b'{"author": "Andr\xe9"}', b"7"])
def test_a_damaged_folder_is_an_error_of_ours(initialization, tmp_path, content):
    initialization.save(tmp_path)
    (tmp_path / "regrad.json").write_bytes(content)
    with pytest.raises(InitializationError, match=str(tmp_path)):
        MetaInitialization.load(tmp_path)


def test_a_model_with_adapters_is_refused(initialization, model):
    adapter = Adapter(model, initialization)
    with pytest.raises(AdapterError, match="already carries adapters"):
        Adapter(adapter.model, initialization)


def test_a_basis_rounded_to_bytes_is_kept_in_bytes(model, tmp_path):
    initialization = tiny_initialization(model, "core")
    before = initialization.modules
    rounded = replace(initialization, modules={name: replace(m, basis=in_bytes(m.basis)) for name, m in before.items()})
    rounded.save(tmp_path)
    own = load_file(tmp_path / "regrad.safetensors")
    again = MetaInitialization.load(tmp_path)
    assert again.fingerprint == rounded.fingerprint != initialization.fingerprint
    for name, module in before.items():
        assert own[f"{name}.basis"].dtype == torch.int8
        assert torch.equal(again.modules[name].basis, rounded.modules[name].basis)
        largest = module.basis.abs().amax(0)
        assert bool(((again.modules[name].basis - module.basis).abs() <= 0.51 / 127 * largest).all())
    initialization.save(tmp_path)
    assert MetaInitialization.load(tmp_path).fingerprint == initialization.fingerprint


def test_damaged_folders_are_refused(initialization, tmp_path):
    with pytest.raises(InitializationError, match="no meta-initialization at"):
        MetaInitialization.load(tmp_path / "nowhere")
    initialization.save(tmp_path)
    settings = json.loads((tmp_path / "regrad.json").read_text())
    (tmp_path / "regrad.json").write_text(json.dumps(settings | {"max_length": 99}))
    with pytest.raises(InitializationError, match="restore it"):
        MetaInitialization.load(tmp_path)
    (tmp_path / "regrad.json").write_text(json.dumps(settings | {"format": 9}))
    with pytest.raises(InitializationError, match="format 9"):
        MetaInitialization.load(tmp_path)
    (tmp_path / "regrad.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InitializationError, match="can't read"):
        MetaInitialization.load(tmp_path)


def test_a_fresh_one_leaves_the_model_unchanged(model):
    initialization = fresh(
        model, BaseModel.of(model, "tiny"), kind="core", targets=["up_proj"], layers=[0], rank=4, basis_rank=4,
        lora_alpha=8, step_size=1.0, max_length=32,
    )  # fmt: skip
    ids = torch.arange(3, 20).unsqueeze(0)
    plain = model(input_ids=ids).logits
    assert torch.equal(Adapter(model, initialization).model(input_ids=ids).logits, plain)
    module = next(iter(initialization.modules.values()))
    torch.testing.assert_close(module.lora_a @ module.lora_a.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.basis.T @ module.basis, torch.eye(4), rtol=0, atol=1e-5)


def test_layers_that_the_model_lacks_are_named_with_those_it_has(model):
    with pytest.raises(InitializationError, match="down_proj"):
        tiny_initialization(model, targets=["fc1"])
    with pytest.raises(InitializationError, match="rank 99"):
        tiny_initialization(model, rank=99)


def test_a_clone_has_further_ones_by_their_names(initialization, tmp_path, monkeypatch):
    from regrad_qdrant.model import initialization as module

    initialization.save(tmp_path / "of-a-clone")
    monkeypatch.setattr(module, "OF_CLONE", tmp_path)
    assert MetaInitialization.load("of-a-clone").fingerprint == initialization.fingerprint
    with pytest.raises(InitializationError, match="smollm2-135m-instruct.*of-a-clone"):
        MetaInitialization.load("nowhere")
