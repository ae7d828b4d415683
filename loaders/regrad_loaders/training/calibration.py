"""The first step size: the one that lowers documents' own loss most within a trust region."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.gradients import document_losses, pad
from regrad_qdrant.model.plugin import row_updates

STEP_SIZE_GRID = tuple(10 ** (i / 4) for i in range(-16, 13))  # 0.0001 to 1000, four a decade


def calibrate(learner: MetaLearner, passages: Sequence[Sequence[int]]) -> tuple[float, list[dict[str, float]]]:
    """The step size that lowers the documents' own loss most within a trust region.

    Each document's atom is applied with every size of the grid; `own` is the mean change of the document's
    loss, `other` that of a document which the atom knows nothing of (the one half the list away). The trust
    region: `other` may rise by no more than half of what `own` falls. Returns the size and the whole table.

    Args:
        passages: token ids; those of one token, which have no loss, are left out.

    Raises:
        InitializationError: if fewer than two are left, or no size can be trusted.
    """
    passages = [ids for ids in passages if len(ids) > 1]
    if len(passages) < 2:
        raise InitializationError("a step size is calibrated on two passages of two tokens at least")
    atoms, before = learner.atoms(passages, create_graph=False)
    batch = pad(passages, learner.pad_id, learner.device)
    half = len(passages) // 2
    table = []
    with torch.no_grad():
        for size in STEP_SIZE_GRID:
            changes = []
            for shift in (0, half):
                rows = {name: -size * atom.roll(shift, 0) for name, atom in atoms.items()}
                with row_updates(learner.model[0], learner.space, rows):
                    changes.append(float((document_losses(learner.model[0], *batch) - before).mean()))
            own, other = changes
            table.append({"step_size": size, "own": own, "other": other})
            if own > 0.5:
                break  # far past the minimum
    trusted = [row for row in table if row["own"] < 0 and row["other"] <= -0.5 * row["own"]]
    if not trusted:
        raise InitializationError(
            f"no step size from {table[0]['step_size']:g} to {table[-1]['step_size']:g} lowers the documents' loss and "
            "leaves that of others: give one in the recipe (step_size)"
        )
    return min(trusted, key=lambda row: row["own"])["step_size"], table
