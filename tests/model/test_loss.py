import torch
from torch.nn.functional import cross_entropy

from regrad_qdrant.model import loss


def test_matches_autograd_in_value_gradient_and_second_derivative(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (20,))
    start = torch.randn(20, 8)

    def derivatives(function):
        x = start.clone().requires_grad_(True)
        losses = function(x**2)
        (first,) = torch.autograd.grad((losses * torch.linspace(0, 1, 20)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum() + losses.sum(), x)
        return losses, first, second

    ours = derivatives(lambda hidden: loss.token_cross_entropy(hidden, weight, targets))
    plain = derivatives(lambda hidden: cross_entropy(hidden @ weight.T, targets, reduction="none"))
    for found, expected in zip(ours, plain, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()
