"""An evaluation's questions as each party is asked them with each k, but for what a run before has answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.journal import Journal
from regrad_loaders.evaluation.plan import Party, retrieves
from regrad_loaders.evaluation.results import Evaluation, Prediction, Stored


@dataclass
class Rounds:
    """What is asked, and what was answered.

    Args:
        top_k: of the round in which every mode is asked.
        sweep: further k, with which the modes that retrieve are asked again.
        journal: where answers are kept as they are given.
    """

    questions: Sequence[Question]
    top_k: int
    sweep: Sequence[int]
    journal: Journal | None
    found: list[Evaluation] = field(default_factory=list)  # with top_k, a part for each party
    swept: dict[int, list[Evaluation]] = field(init=False)

    def __post_init__(self) -> None:
        self.swept = {k: [] for k in self.sweep}
        self._ids = {question.id for question in self.questions}

    def count(self, modes: Sequence[str]) -> int:
        """How many answers these modes give."""
        return len(self.questions) * (len(modes) + len(self.sweep) * sum(map(retrieves, modes)))

    def is_done(self, party: Party) -> bool:
        """Whether an earlier run has all of its answers: then nothing is made for it."""
        for k, names, _ in self._of(party):
            known = self._known(names, k)
            if any((mode, key) not in known for mode in names for key in self._ids):
                return False
        return True

    def ask(self, party: Party, answered: Callable[..., Evaluation], advance: Callable[[int], None]) -> None:
        """Ask a party in every round.

        Args:
            answered: `evaluate` of its answerer, but for the modes, k and what is known.
            advance: called with the number of answers just given, or found in the journal.
        """
        for k, names, parts in self._of(party):
            known = self._known(names, k)
            advance(sum(key in self._ids for _, key in known))

            def given(one: Prediction, names: Mapping[str, str] = names, k: int = k) -> None:
                if self.journal is not None:
                    self.journal.add(one, names[one.mode], k)
                advance(1)

            parts.append(answered(list(names), top_k=k, known=known, on_progress=given).named(names))

    def result(
        self, settings: dict[str, Any], modes: Sequence[str], against: Sequence[str], stored: Mapping[str, Stored]
    ) -> Evaluation:
        """The whole, its predictions in the order of the modes."""
        return replace(
            Evaluation.joined(settings, self.found, modes),
            recall_at_k=self.found[0].recall_at_k,
            against=tuple(against),
            sweep=tuple((k, Evaluation.joined(settings, parts, modes)) for k, parts in self.swept.items() if parts),
            stored=dict(stored),
        )

    def _of(self, party: Party) -> Iterator[tuple[int, dict[str, str], list[Evaluation]]]:
        """Each k, the modes of the party that are asked with it, and where their answers go."""
        yield self.top_k, party.modes, self.found
        again = {mode: name for mode, name in party.modes.items() if retrieves(name)}
        if again:
            yield from ((k, again, parts) for k, parts in self.swept.items())

    def _known(self, names: Mapping[str, str], k: int) -> dict[tuple[str, str], Prediction]:
        return {} if self.journal is None else self.journal.known(names, k)
