import copy
import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import state_of, tiny_initialization, tiny_model

from regrad_qdrant import Adapter
from regrad_qdrant.answer.atom_cache import AtomCache
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.errors import AdapterError, AdapterInUseError, CorruptRecordError, WrongShapeError, WrongSpaceError
from regrad_qdrant.model import plugin
from regrad_qdrant.model.plugin import lora_layers

IDS = torch.arange(3, 30).unsqueeze(0)


@pytest.fixture
def adapter(model, initialization):
    return Adapter(model, initialization)


def records(adapter, count=2, codec="fp32"):
    torch.manual_seed(3)
    flat = torch.randn(count, adapter.space.numel)
    return flat, make_records(flat, ["t"] * count, adapter.initialization.fingerprint, codec)


def test_the_weights_inside_are_those_of_the_formula(model, kind):
    """φ' = φ₀ − α ⊙ Σ wᵢ·g(dᵢ), computed here by hand."""
    initialization = tiny_initialization(model, kind)
    sizes = {name: 0.1 * (i + 1) for i, name in enumerate(initialization.step_sizes)}
    adapter = Adapter(model, initialization.with_step_sizes(sizes))
    flat, stored = records(adapter)
    change = adapter.space.unflatten(2.0 * flat[0] + 0.5 * flat[1])
    update = adapter.space.to_update({name: -sizes[name] * tensor for name, tensor in change.items()})
    before = {name: parameter.detach().clone() for name, parameter in adapter._parameters.items()}
    with adapter.applied(stored, [2.0, 0.5]):
        for name, parameter in adapter._parameters.items():
            torch.testing.assert_close(parameter.detach(), before[name] + update.get(name, 0.0))


def test_restores_every_weight_bit_for_bit(adapter):
    before, (_, stored) = state_of(adapter), records(adapter)
    with adapter.initial():
        plain = adapter.model(input_ids=IDS).logits
    with adapter.applied(stored):
        inside = state_of(adapter)
        assert not torch.allclose(adapter.model(input_ids=IDS).logits, plain)
    assert inside != before == state_of(adapter)
    with adapter.initial(), adapter.initial():  # one inside the other is no more
        assert torch.equal(adapter.model(input_ids=IDS).logits, plain)


def test_restores_after_an_exception_inside(adapter):
    before, (_, stored) = state_of(adapter), records(adapter)
    with pytest.raises(RuntimeError, match="inside"), adapter.applied(stored):
        raise RuntimeError("inside")
    assert state_of(adapter) == before
    with adapter.applied(stored):
        pass


def test_restores_after_a_failure_in_the_middle_of_writing(adapter, monkeypatch):
    before, (_, stored) = state_of(adapter), records(adapter)
    calls = []

    def fail_at_third(name, initial, update):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return initial + update

    monkeypatch.setattr(adapter, "_written", fail_at_third)
    with pytest.raises(MemoryError), adapter.applied(stored):
        pass
    assert state_of(adapter) == before


def test_nested_use_is_refused_and_harms_nothing(adapter):
    before, (_, stored) = state_of(adapter), records(adapter)
    with adapter.applied(stored):
        inside = state_of(adapter)
        for block in (adapter.applied(stored), adapter.disabled(), adapter.initial()):
            with pytest.raises(AdapterInUseError), block:
                pass
        assert state_of(adapter) == inside
    assert state_of(adapter) == before


@pytest.mark.parametrize("cache_bytes", [0, 10**7])
def test_a_sum_that_overflows_is_refused(model, initialization, cache_bytes):
    adapter = Adapter(model, initialization, cache_bytes=cache_bytes)
    huge = torch.full((2, adapter.space.numel), 3e38)
    stored = make_records(huge, ["a", "b"], initialization.fingerprint, "fp32")
    with pytest.raises(CorruptRecordError, match="not finite"):
        adapter.decode(stored)


def test_threads_take_turns(adapter):
    before = state_of(adapter)
    seen, errors = {}, []
    space, fingerprint = adapter.space, adapter.initialization.fingerprint
    stored = {i: make_records(torch.full((1, space.numel), float(i)), ["t"], fingerprint, "fp32") for i in (1, 2, 3)}

    def work(name):
        try:
            for _ in range(10):
                with adapter.applied(stored[name]):
                    first = state_of(adapter)
                    seen.setdefault(name, set()).add(first)
                    assert state_of(adapter) == first
        except Exception as error:  # noqa: BLE001 (a thread's failure must reach the test)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in stored]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(len(states) == 1 for states in seen.values()) and len(set.union(*seen.values())) == 3
    assert state_of(adapter) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_the_block_the_model_computes_what_peft_would(dtype):
    model = tiny_model().to(dtype)
    adapter = Adapter(model, tiny_initialization(model))
    _, stored = records(adapter)
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    with adapter.applied(stored), torch.inference_mode():
        lean = adapter.model(input_ids=ids).logits
        for layer in lora_layers(adapter.model).values():
            del layer.forward
        pefts = adapter.model(input_ids=ids).logits
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(lean, pefts, **close)
    assert (lean - model(input_ids=ids).logits).abs().max() > 1e-3


def test_decoded_atoms_are_kept_within_their_bytes(model, initialization):
    adapter = Adapter(model, initialization)
    _, stored = records(adapter, 3)
    expected = adapter.decode(stored, [1.0, 0.5, -2.0])
    size = len(stored[0].atom) + 4 * adapter.space.numel
    adapter.cache = AtomCache(int(2.5 * size))
    for _ in range(2):
        torch.testing.assert_close(adapter.decode(stored, [1.0, 0.5, -2.0]), expected)
        assert len(adapter.cache) == 2 and adapter.cache.bytes <= adapter.cache.limit
    asked = []
    for record in (stored[2], stored[1], stored[0], stored[1]):
        adapter.cache.get(record, lambda r: asked.append(r) or adapter.decode([r]))
    assert asked == [stored[0]]  # the two used last were at hand
    with pytest.raises(WrongSpaceError):
        adapter.decode([Record("f" * 16, stored[0].sha, stored[0].codec, stored[0].atom)])


def test_the_order_of_the_atoms_does_not_matter(adapter):
    _, stored = records(adapter, 3)
    torch.testing.assert_close(adapter.decode(stored), adapter.decode(stored[::-1]))


def test_bad_records_are_refused_before_any_weight_changes(adapter):
    before, (_, stored) = state_of(adapter), records(adapter)
    other_space = Record("f" * 16, stored[0].sha, stored[0].codec, stored[0].atom)
    damaged = Record(stored[0].space, stored[0].sha, stored[0].codec, stored[0].atom[:-40] + "A" * 40)
    for bad, kind in ((other_space, WrongSpaceError), (damaged, CorruptRecordError)):
        with pytest.raises(kind), adapter.applied([stored[1], bad]):
            pass
    with pytest.raises(WrongShapeError), adapter.applied(stored, [1.0]):
        pass
    assert state_of(adapter) == before


def test_outside_of_its_blocks_the_callers_model_is_the_bare_one(model, initialization, kind):
    state, modules = {n: t.clone() for n, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    plain = model(input_ids=IDS).logits
    adapter = Adapter(model, tiny_initialization(model, kind))
    _, stored = records(adapter)
    blocks = [adapter.applied(stored), adapter.initial(), adapter.rows([None], [False]), adapter.disabled()]
    for block, is_bare in zip(blocks, (False, False, False, True), strict=True):
        with block:
            assert torch.equal(model(input_ids=IDS).logits, plain) == is_bare
        assert torch.equal(model(input_ids=IDS).logits, plain)
        assert [type(m) for m in model.modules()] == modules
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and len(state) == len(
            model.state_dict()
        )
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_rows_that_are_bare_run_as_the_base_model(model, initialization):
    plain = model(input_ids=IDS).logits
    adapter = Adapter(model, initialization)
    flat, stored = records(adapter)
    with adapter.applied(stored[:1]):
        applied = adapter.model(input_ids=IDS).logits
    with adapter.rows([None, flat[0]], [True, False]):
        found = adapter.model(input_ids=IDS.repeat(2, 1)).logits
    torch.testing.assert_close(found, torch.cat([plain, applied]), rtol=1e-4, atol=1e-5)


def test_follows_a_model_that_moves_to_another_type(adapter, model):
    _, stored = records(adapter)
    with adapter.applied(stored):
        before = adapter.model(input_ids=IDS).logits
    model.to(torch.bfloat16)
    with adapter.applied(stored):
        assert all(parameter.dtype == torch.float32 for parameter in adapter._parameters.values())
        torch.testing.assert_close(adapter.model(input_ids=IDS).logits.float(), before, rtol=5e-2, atol=5e-2)


def test_an_exported_update_runs_in_plain_peft(model, kind, tmp_path):
    from peft import PeftModel

    adapter = Adapter(model, tiny_initialization(model, kind))
    before, (_, stored) = state_of(adapter), records(adapter)
    with adapter.applied(stored, [1.0, 0.5]):
        expected = adapter.model(input_ids=IDS).logits
    adapter.export(tmp_path / "update", stored, [1.0, 0.5], base_model="served-as")
    assert state_of(adapter) == before
    config = json.loads((tmp_path / "update" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "served-as"
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "update")
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_update_is_merged_without_a_model(model, kind):
    adapter = Adapter(model, tiny_initialization(model, kind))
    _, stored = records(adapter)
    tensors = adapter.initialization.adapter_tensors(stored, [1.0, 0.5])
    with adapter.applied(stored, [1.0, 0.5]):
        for name, parameter in adapter._parameters.items():
            torch.testing.assert_close(tensors[f"base_model.model.{name}.weight"], parameter.detach())
    again = adapter.initialization.adapter_tensors(stored, [1.0, 0.5])
    assert all(tensor.data_ptr() != again[name].data_ptr() for name, tensor in tensors.items())
    with pytest.raises(WrongShapeError, match="1 weights for 2 records"):
        adapter.initialization.adapter_tensors(stored, [1.0])


def test_two_initializations_of_one_model_take_turns(model):
    first = tiny_initialization(model)
    second = tiny_initialization(tiny_model(), rank=3)
    ids = torch.arange(5, 15)[None]

    def logits(adapter):
        with adapter.initial():
            return adapter.model(input_ids=ids).logits

    bare, alone = model(ids).logits, [logits(Adapter(tiny_model(), one, check_model=False)) for one in (first, second)]
    one = Adapter(model, first, check_model=False)
    other = Adapter(model, second, check_model=False, beside=one)
    for _ in range(2):
        assert torch.equal(logits(one), alone[0]) and torch.equal(logits(other), alone[1])
        assert torch.equal(model(ids).logits, bare)
    with one.initial(), pytest.raises(AdapterInUseError), other.initial():
        pass
    one.release()
    assert torch.equal(logits(other), alone[1])
    other.release()
    assert torch.equal(model(ids).logits, bare)


def test_a_new_adapter_takes_the_model_over_from_all_that_had_it(model, initialization):
    one = Adapter(model, initialization)
    other = Adapter(model, tiny_initialization(tiny_model(), rank=3), check_model=False, beside=one)
    Adapter(model, initialization)
    for before in (one, other):
        with pytest.raises(AdapterError, match="taken over"), before.initial():
            pass


def test_an_update_of_rows_that_fails_leaves_every_layer_as_it_was(adapter):
    flat, _ = records(adapter)
    with adapter.initial():
        before = adapter.model(input_ids=IDS).logits
    change = adapter.row_change([flat[0]], [False])
    lacking = dict(list(change.change.items())[:-1])
    with pytest.raises(KeyError), adapter.changed(replace(change, change=lacking)):
        pass
    with adapter.initial():
        assert torch.equal(adapter.model(input_ids=IDS).logits, before)


def test_a_model_is_shared_with_its_own_adapters_alone(adapter, initialization):
    other = tiny_model()
    with pytest.raises(AdapterError, match="beside: the adapter is of another model"):
        Adapter(other, initialization, beside=adapter)
    mine = Adapter(other, initialization)
    mine.release()
    with pytest.raises(AdapterError, match="or was released"):
        Adapter(other, initialization, beside=mine)


def test_an_adapter_that_can_not_be_made_takes_nothing_over(adapter, model, initialization, monkeypatch):
    with adapter.initial():
        before = adapter.model(input_ids=IDS).logits
    larger = tiny_initialization(tiny_model(num_hidden_layers=5), layers=[3, 4])
    with pytest.raises(AdapterError, match="lacks 6 adapted layers"):
        Adapter(model, larger, check_model=False)
    with adapter.initial():
        assert torch.equal(adapter.model(input_ids=IDS).logits, before)

    def short_of_memory(layer):
        raise MemoryError

    bare = model(input_ids=IDS).logits
    with monkeypatch.context() as patched:
        patched.setattr(plugin, "lean_forward", short_of_memory)
        with pytest.raises(MemoryError):
            Adapter(model, initialization)
    assert torch.equal(model(input_ids=IDS).logits, bare)
    with adapter.initial():  # which no other has taken the place of
        assert torch.equal(adapter.model(input_ids=IDS).logits, before)
    with Adapter(model, initialization).initial():
        assert torch.equal(model(input_ids=IDS).logits, before)
