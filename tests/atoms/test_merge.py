import math

import pytest
import torch

from regrad_qdrant import MergeRule
from regrad_qdrant.atoms.merge import merge_weights


def test_rules():
    scores = [20.0, 10.0, 5.0]
    assert MergeRule("sum").weights(scores) == [1, 1, 1]
    assert MergeRule("top1").weights([5.0, 20.0, 10.0]) == [0, 1, 0]
    assert MergeRule("margin", 0.5).weights(scores) == pytest.approx([1, math.exp(-1), math.exp(-1.5)])
    softmax = MergeRule("softmax", 0.5).weights(scores)
    assert sum(softmax) == pytest.approx(1) and softmax[0] / softmax[1] == pytest.approx(math.e)


def test_weights_do_not_depend_on_the_scale_of_the_scores():
    rule = MergeRule("margin", 0.3)
    assert rule.weights([2.0, 1.0]) == pytest.approx(rule.weights([200.0, 100.0]))


def test_scores_of_zero_or_below_still_rank():
    weights = MergeRule("softmax", 0.3).weights([-0.1, -0.4])
    assert weights[0] > weights[1] > 0 and sum(weights) == pytest.approx(1)


def test_no_scores_no_weights():
    assert MergeRule("softmax").weights([]) == []


def test_absent_documents_get_nothing_and_the_temperature_learns():
    temperature = torch.tensor(0.3, requires_grad=True)
    scores = torch.tensor([[9.0, 4.0, 100.0]])
    weights = merge_weights("softmax", scores, torch.tensor([[True, True, False]]), temperature)
    assert weights[0, 2] == 0 and float(weights.detach().sum()) == pytest.approx(1)
    weights[0, 1].backward()
    assert temperature.grad > 0


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match="top1"):
        MergeRule("mean")
    with pytest.raises(ValueError, match="positive"):
        MergeRule("softmax", 0.0)
