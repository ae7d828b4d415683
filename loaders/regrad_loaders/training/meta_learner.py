"""Meta-training: min over φ₀, α, U of Σ −log p(answer | question; θ, φ₀ − α ⊙ Σ wᵢ·g(dᵢ)), second order.

One step works on an episode: all its passages go through the model in one batch, a zero change of the atom
space in every row; the gradient of each row's loss by its own zero change is that passage's atom, and stays in
the graph. Then all questions go through the model in one batch, row q with the update of the passages that q
retrieved. Layers below the first adapted one never enter the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from regrad_loaders.data.episodes import Episode, Example
from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.merge import MergeRule, length_weight, merge_weights
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.gradients import BATCH_TOKENS, answer_losses, batches, document_losses, pad
from regrad_qdrant.model.initialization import MetaInitialization, in_bytes, scaling_of
from regrad_qdrant.model.plugin import by_rows, live_space, lora_layers, lora_weight, plug_in, row_updates
from regrad_qdrant.model.space import LoraModule
from regrad_qdrant.model.spaces.registry import SPACES


class MetaLearner(nn.Module):
    """The outer parameters φ₀, log α, log τ (and U) over a live model, and the objective of one episode."""

    def __init__(
        self,
        model: nn.Module,
        initialization: MetaInitialization,
        merge: str,
        step_size_mode: str = "tensor",
        step_size_kind: str = "log",
    ) -> None:
        super().__init__()
        self.initialization = initialization
        self.model = [plug_in(model, initialization)]  # in a list: the base model's weights are no parameters of ours
        self.merge = merge
        layers = lora_layers(self.model[0])
        live = live_space(self.model[0], initialization)
        self.names = list(live.modules)
        self.lora_a = nn.ParameterList(lora_weight(layers[name], "lora_A").requires_grad_(True) for name in self.names)
        self.lora_b = nn.ParameterList(lora_weight(layers[name], "lora_B").requires_grad_(True) for name in self.names)
        bases = [live.modules[name].basis for name in self.names]
        self.basis = nn.ParameterList(nn.Parameter(basis.clone()) for basis in bases if basis is not None)
        start = self._first_step_sizes(step_size_mode)
        self.learns_logarithm = step_size_kind == "log"
        self.register_buffer(
            "step_size_sign", start.sign(), persistent=False
        )  # released checkpoints have negative ones
        learned = start.abs().log() if self.learns_logarithm else start
        self.step_size = nn.Parameter(learned, step_size_mode != "fixed")  # log |α|, or α itself
        self.log_temperature = nn.Parameter(self.lora_a[0].new_tensor(math.log(initialization.merge.temperature)))
        self.space = SPACES[initialization.kind](self.plug_in_modules())

    def plug_in_modules(self) -> dict[str, LoraModule]:
        start = self.initialization
        scaling = scaling_of(start.lora_alpha, start.rank, start.rank_stabilized)
        bases: Sequence[Tensor | None] = list(self.basis) or [None] * len(self.names)
        return {
            name: LoraModule(a, b, scaling, u)
            for name, a, b, u in zip(self.names, self.lora_a, self.lora_b, bases, strict=True)
        }

    def _first_step_sizes(self, mode: str) -> Tensor:
        """Where α starts: one for all tensors, one for each, or one for each number. Training moves its logarithm."""
        start = self.initialization
        sizes = start.flat_step_sizes().to(self.lora_a[0])
        if bool((sizes == 0).any()):
            raise InitializationError("training learns log |α|: it can't go on from a step size of 0")
        if mode == "full" or (mode == "fixed" and start.has_full_step_sizes):
            return sizes
        if start.has_full_step_sizes:
            raise InitializationError("the initialization has a step size for every number: go on in the mode full")
        of_tensors = sizes.new_tensor([start.step_sizes[name] for name in start.space.shapes])
        if mode != "one":
            return of_tensors
        if bool((of_tensors.sign() != of_tensors[0].sign()).any()):
            raise InitializationError("step sizes of different signs have no common one: take step_size_mode tensor")
        return of_tensors[0].sign() * of_tensors.abs().log().mean().exp().unsqueeze(0)

    def step_sizes(self) -> dict[str, Tensor]:
        """α of each tensor of the space: one number, or its shape in the mode `full`."""
        sizes = self.step_size_sign * self.step_size.exp() if self.learns_logarithm else self.step_size
        if len(sizes) == self.space.numel:
            return self.space.unflatten(sizes)
        return dict(zip(self.space.shapes, sizes.expand(len(self.space.shapes)), strict=True))

    def atoms(self, passages: Sequence[Sequence[int]], *, create_graph: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The atom of each passage, (passages, *shape) a tensor, and each passage's loss (passages,)."""
        zeros = {name: zero.requires_grad_(True) for name, zero in self.no_change(len(passages)).items()}
        ids, mask = pad(passages, self.pad_id, self.device)
        with row_updates(self.model[0], self.space, zeros), sdpa_kernel(SDPBackend.MATH):
            losses = document_losses(self.model[0], ids, mask)
        grads = torch.autograd.grad(losses.sum(), list(zeros.values()), create_graph=create_graph)
        return dict(zip(zeros, grads, strict=True)), losses

    def atoms_in_parts(self, passages: Sequence[Sequence[int]], size: int | None) -> dict[str, Tensor]:
        """The same atoms without a graph, of so many passages at a time (None: all)."""
        size = size or len(passages)
        starts = range(0, len(passages), size)
        parts = [self.atoms(passages[at : at + size], create_graph=False)[0] for at in starts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def projected_atoms(self, passages: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The same atoms, differentiable through the space's own projections (A and U in the core space) alone.

        The first-order option: what the network does with a changed φ₀ on the way to its inputs and gradients is
        held fixed, so no graph is made of the backward pass.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def keep(_module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
                inputs[name], outputs[name] = given[0].detach(), output

            return keep

        layers = lora_layers(self.model[0])
        handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
        try:
            losses = document_losses(self.model[0], *pad(passages, self.pad_id, self.device))
        finally:
            for handle in handles:
                handle.remove()
        deltas = torch.autograd.grad(losses.sum(), [outputs[name] for name in self.names])
        atoms: dict[str, Tensor] = {}
        for name, delta in zip(self.names, deltas, strict=True):
            kept = self.space.keep(name, by_rows(inputs[name], len(passages)))
            self.space.accumulate(atoms, self.space.from_gradients(name, kept, by_rows(delta, len(passages))))
        return atoms

    def no_change(self, count: int) -> dict[str, Tensor]:
        """A change of nothing for so many rows."""
        return {name: self.lora_a[0].new_zeros(count, *shape) for name, shape in self.space.shapes.items()}

    @property
    def device(self) -> torch.device:
        return self.lora_a[0].device

    @property
    def pad_id(self) -> int:
        return int(self.model[0].config.pad_token_id or 0)

    def set_step_size(self, size: float) -> None:
        """Begin with this step size everywhere."""
        with torch.no_grad():
            self.step_size.fill_(math.log(size) if self.learns_logarithm else size)

    def answer_losses(self, examples: Sequence[Example], rows: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """For every question, run with its own row of `rows`, or with φ₀ alone: the answer's mean negative
        log-likelihood and whether greedy decoding would give it (questions,).

        They run in batches of like length: with passages in the prompt, half of one batch would be padding.
        """
        groups = self.groups(examples)
        parts = []
        for group in groups:
            own = None if rows is None else {name: tensor[group] for name, tensor in rows.items()}
            parts.append(self.group_losses([examples[i] for i in group], own))
        order = torch.tensor([i for group in groups for i in group], device=self.device).argsort()
        losses, right = (torch.cat(tensors)[order] for tensors in zip(*parts, strict=True))
        return losses, right

    def groups(self, examples: Sequence[Example]) -> list[list[int]]:
        """The questions that run in one batch, by number."""
        lengths = [len(example.prompt_ids) + len(example.answer_ids) for example in examples]
        return list(batches(lengths, BATCH_TOKENS))

    def group_losses(self, examples: Sequence[Example], rows: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`answer_losses` of one padded batch."""
        pairs = [(example.prompt_ids, example.answer_ids) for example in examples]
        with nullcontext() if rows is None else row_updates(self.model[0], self.space, rows):
            return answer_losses(self.model[0], pairs, self.pad_id)

    def updates(self, examples: Sequence[Example], atoms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """−α ⊙ Σ wᵢ·g(dᵢ) for every question: (questions, *shape) a tensor."""
        count = next(iter(atoms.values())).shape[0]
        scores = self.lora_a[0].new_zeros(len(examples), count)
        present = torch.zeros(len(examples), count, dtype=torch.bool, device=self.device)
        for i, example in enumerate(examples):
            scores[i, example.rows], present[i, example.rows] = scores.new_tensor(example.scores), True
        weights = merge_weights(self.merge, scores, present, self.log_temperature.exp())
        sizes = self.step_sizes()
        return {name: -sizes[name] * torch.einsum("qn,n...->q...", weights, atom) for name, atom in atoms.items()}

    def coded(self, atoms: Mapping[str, Tensor], codec: str) -> dict[str, Tensor]:
        """The atoms as a bank gives them back from this codec; gradients pass straight through its rounding."""
        flat = self.space.flatten(atoms)
        return self.space.unflatten(get_codec(codec).straight_through(flat, self.space.layout))

    def objective(self, episode: Episode, codec: str = "fp32", order: Literal[0, 1, 2] = 2) -> tuple[Tensor, Tensor]:
        """The episode's answer losses and greedy hits, (questions,) each; arguments as `episode_updates`."""
        return self.answer_losses(episode.examples, self.episode_updates(episode, codec, order))

    def episode_updates(self, episode: Episode, codec: str, order: Literal[0, 1, 2]) -> dict[str, Tensor]:
        """The update of every question of the episode, its passages' atoms read from this codec.

        Args:
            order: what is differentiated of the atoms: 2 all of the inner step; 1 its projections
                (`projected_atoms`); 0 nothing, so that the losses depend on α and τ alone.
        """
        return self.merged(episode, self.atoms_to_order(episode.passages, order), codec)

    def atoms_to_order(self, passages: Sequence[Sequence[int]], order: Literal[0, 1, 2]) -> dict[str, Tensor]:
        """The passages' atoms, differentiable as `episode_updates` says."""
        return self.projected_atoms(passages) if order == 1 else self.atoms(passages, create_graph=order == 2)[0]

    def merged(self, episode: Episode, atoms: Mapping[str, Tensor], codec: str) -> dict[str, Tensor]:
        """The update of every question of the episode, of these atoms of its passages, read from this codec."""
        coded = self.coded(atoms, codec)
        shares = self.lora_a[0].new_tensor([length_weight(len(passage)) for passage in episode.passages])
        short = {name: atom * shares.view(-1, *[1] * (atom.dim() - 1)) for name, atom in coded.items()}
        return self.updates(episode.examples, short)

    def refitted(self, card: Mapping[str, Any]) -> MetaInitialization:
        """The initialization that it started from with the learned α and τ: its fingerprint stays."""
        return replace(
            self.initialization.with_step_sizes(self._learned_step_sizes(), self._learned_merge()), card=dict(card)
        )

    def trained(self, card: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> MetaInitialization:
        """The meta-initialization as learned so far, A and B rounded to `dtype` and U to bytes, as they are saved."""

        def rounded(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).float().cpu()

        start = self.initialization
        modules = {
            name: LoraModule(
                rounded(m.lora_a), rounded(m.lora_b), m.scaling, None if m.basis is None else in_bytes(m.basis)
            )
            for name, m in self.plug_in_modules().items()
        }
        return MetaInitialization(
            base=start.base,
            kind=start.kind,
            lora_alpha=start.lora_alpha,
            modules=modules,
            step_sizes=self._learned_step_sizes(),
            max_length=start.max_length,
            merge=self._learned_merge(),
            passages_in_prompt=start.passages_in_prompt,
            rank_stabilized=start.rank_stabilized,
            prompt=start.prompt,
            card=dict(card),
        )

    def _learned_step_sizes(self) -> dict[str, float | Tensor]:
        sizes = {name: size.detach() for name, size in self.step_sizes().items()}
        return {name: size.cpu().clone() if size.dim() else float(size) for name, size in sizes.items()}

    def _learned_merge(self) -> MergeRule:
        return MergeRule(self.merge, float(self.log_temperature.detach().exp()))
