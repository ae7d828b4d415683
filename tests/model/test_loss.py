import pytest
import torch
from torch.nn.functional import cross_entropy

from regrad_qdrant.model import loss
from regrad_qdrant.model.head import Head

HEADS = {"plain": {}, "biased": {"bias": torch.linspace(-1, 1, 50)}, "scaled": {"scale": 0.3}, "capped": {"cap": 3.0}}


@pytest.mark.parametrize("kind", [*HEADS, "all"])
def test_matches_autograd_in_value_gradient_and_second_derivative(monkeypatch, kind):
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (20,))
    head = Head(
        weight, **{name: value for of in HEADS.values() for name, value in of.items()} if kind == "all" else HEADS[kind]
    )
    start = torch.randn(20, 8)

    def derivatives(function):
        x = start.clone().requires_grad_(True)
        losses = function(x**2)
        (first,) = torch.autograd.grad((losses * torch.linspace(0, 1, 20)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum() + losses.sum(), x)
        return losses, first, second

    ours = derivatives(lambda hidden: loss.token_cross_entropy(hidden, head, targets)[0])
    plain = derivatives(lambda hidden: cross_entropy(head.logits(hidden), targets, reduction="none"))
    for found, expected in zip(ours, plain, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()
