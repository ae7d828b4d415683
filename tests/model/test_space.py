import torch
from conftest import tiny_initialization

from regrad_qdrant.model.plugin import live_space, lora_layers, lora_weight, plug_in, row_updates


def test_a_row_update_equals_the_update_of_the_lora_tensors(model, kind):
    """A change applied to one row by hooks, and the same change written into the LoRA tensors, agree."""
    initialization = tiny_initialization(model, kind)
    peft_model = plug_in(model, initialization)
    space = live_space(peft_model, initialization)
    torch.manual_seed(1)
    change = {name: 0.1 * torch.randn(shape) for name, shape in space.shapes.items()}
    ids = torch.randint(3, 600, (1, 12))
    plain = peft_model(input_ids=ids).logits
    with row_updates(peft_model, space, {name: tensor.unsqueeze(0) for name, tensor in change.items()}):
        by_row = peft_model(input_ids=ids).logits
    layers = lora_layers(peft_model)
    for name, update in space.to_update(change).items():
        module, part = name.rsplit(".", 1)
        lora_weight(layers[module], part).data.add_(update)
    torch.testing.assert_close(by_row, peft_model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert (by_row - plain).abs().max() > 1e-3


def test_every_row_has_its_own_update(model, kind):
    initialization = tiny_initialization(model, kind)
    peft_model = plug_in(model, initialization)
    space = live_space(peft_model, initialization)
    torch.manual_seed(1)
    rows = {name: 0.1 * torch.randn(2, *shape) for name, shape in space.shapes.items()}
    ids = torch.randint(3, 600, (1, 12)).expand(2, -1)
    with row_updates(peft_model, space, rows):
        both = peft_model(input_ids=ids).logits
    for i in range(2):
        with row_updates(peft_model, space, {name: tensor[i : i + 1] for name, tensor in rows.items()}):
            torch.testing.assert_close(peft_model(input_ids=ids[:1]).logits[0], both[i], rtol=1e-4, atol=1e-5)


def test_numel_counts_what_the_design_says(model):
    core = tiny_initialization(model, "core", rank=4, basis_rank=3).space
    lora = tiny_initialization(model, "lora", rank=4).space
    assert core.numel == 6 * 3 * 4  # two layers of three modules, p × r each
    assert lora.numel == 2 * 3 * 4 * (32 + 48)


def test_a_tied_core_belongs_to_a_layer_and_is_the_sum_of_its_modules_cores(model):
    core, tied = (tiny_initialization(model, kind, rank=4, basis_rank=3).space for kind in ("core", "tied"))
    assert list(tied.shapes.items()) == [(f"model.layers.{layer}.core", (3, 4)) for layer in (1, 2)]
    torch.manual_seed(2)
    inputs = {name: torch.randn(2, 5, module.d_in) for name, module in core.modules.items()}
    deltas = {name: torch.randn(2, 5, module.d_out) for name, module in core.modules.items()}
    of_modules, of_layers = {}, {}
    for space, atoms in ((core, of_modules), (tied, of_layers)):
        for name in space.modules:
            space.accumulate(atoms, space.from_gradients(name, space.keep(name, inputs[name]), deltas[name]))
    for layer, found in of_layers.items():
        expected = sum(atom for name, atom in of_modules.items() if name.startswith(layer.removesuffix("core")))
        torch.testing.assert_close(found, expected)


def test_values_are_the_gradient_of_b_alone(model):
    lora, values = (tiny_initialization(model, kind, rank=4).space for kind in ("lora", "values"))
    torch.manual_seed(2)
    for name, module in lora.modules.items():
        x, delta = torch.randn(2, 5, module.d_in), torch.randn(2, 5, module.d_out)
        whole = lora.from_gradients(name, lora.keep(name, x), delta)
        [found] = values.from_gradients(name, values.keep(name, x), delta).values()
        torch.testing.assert_close(found.mT, whole[f"{name}.lora_B"])


def test_values_of_one_width_are_one_matrix(model):
    layout = tiny_initialization(model, "values", rank=4).space.layout
    assert layout.matrices == ((2 * 4, 32), (2 * 2 * 4, 48))  # down of two layers; gate and up of two layers


def test_flatten_and_unflatten_are_inverse(model, kind):
    space = tiny_initialization(model, kind).space
    flat = torch.randn(2, space.numel)
    assert torch.equal(space.flatten(space.unflatten(flat)), flat)
