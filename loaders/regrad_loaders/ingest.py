"""Ingestion: a corpus, or a collection that exists, to a bank. Resumable: what is there is not computed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regrad_loaders.data import Passage
from regrad_qdrant.bank import Document, GradientBank, Hit
from regrad_qdrant.codec import get_codec
from regrad_qdrant.errors import DataError
from regrad_qdrant.gradients import EncodedDocument, GradientComputer, batches
from regrad_qdrant.record import make_records

PAGE = 256  # points looked up at a time; within a page, documents are sorted by length
BATCH_TOKENS = 2048  # of one gradient batch, with padding; lower it where memory is short


@dataclass
class IngestReport:
    """What an ingestion did."""

    points_added: int = 0
    points_updated: int = 0  # whose text or fields the corpus has changed
    atoms_written: int = 0
    passed_over: int = 0  # computed, but the point was gone or changed by then; the next run does them
    present: int = 0  # atoms that were there already and fit their text
    truncated: int = 0  # texts over max_length, of those written
    skipped: dict[str, str] = field(default_factory=dict)  # document id → why it has no atom
    tokens: int = 0
    seconds: float = 0.0  # of gradients, codec and writes

    @property
    def documents_per_second(self) -> float:
        return self.atoms_written / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"documents_per_second": self.documents_per_second}


def add_corpus(bank: GradientBank, passages: Sequence[Passage], gradients: GradientComputer) -> tuple[int, int]:
    """Make the collection if need be, add the passages that are new and update those that have changed.

    Returns how many of each.

    Every text is checked before anything is written.

    Raises:
        DataError: for a text that can't have a gradient; the collection is as before.
    """
    for passage in passages:
        try:
            gradients.encode(passage.text)
        except DataError as error:
            raise DataError(f"passage {passage.id!r}: {error}") from error
    bank.create()
    return bank.sync(Document(passage.id, passage.payload) for passage in passages)


def attach_atoms(
    bank: GradientBank,
    gradients: GradientComputer,
    codec: str,
    on_progress: Callable[[int], None] = lambda _: None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> IngestReport:
    """Compute and attach the atom of every point that lacks one, or whose text has changed since.

    Args:
        on_progress: called with the number of points just dealt with.
        batch_tokens: bound of one gradient batch, with its padding.
    """
    get_codec(codec)
    bank.index()
    bank.describe(gradients.space)
    report = IngestReport(present=bank.store.count(bank.has_atom))
    stale = [hit.id for hit in bank.stale()]
    report.present -= len(stale)
    started = time.perf_counter()
    for page in _pages(bank.missing()):
        _attach_page(page, bank, gradients, codec, report, on_progress, batch_tokens)
    for at in range(0, len(stale), PAGE):
        _attach_page(bank.fetch(stale[at : at + PAGE]), bank, gradients, codec, report, on_progress, batch_tokens)
    report.seconds = time.perf_counter() - started
    report.passed_over = max(0, report.present + report.atoms_written - bank.store.count(bank.has_atom))
    report.atoms_written -= report.passed_over
    return report


def _attach_page(
    page: Sequence[Hit],
    bank: GradientBank,
    gradients: GradientComputer,
    codec: str,
    report: IngestReport,
    on_progress: Callable[[int], None],
    batch_tokens: int,
) -> None:
    usable: list[tuple[Hit, EncodedDocument]] = []
    for hit in page:
        try:
            if not hit.text:
                raise DataError(f"no text for the layout {bank.layout}")
            usable.append((hit, gradients.encode(hit.text)))
        except DataError as error:
            report.skipped[str(hit.document_id)] = str(error)
            on_progress(1)
    for batch in batches([len(document.ids) for _, document in usable], batch_tokens):
        hits = [usable[i][0] for i in batch]
        documents = [usable[i][1] for i in batch]
        atoms = gradients.atoms(documents)
        finite = atoms.isfinite().all(dim=1).tolist()
        for hit in (hit for hit, good in zip(hits, finite, strict=True) if not good):
            report.skipped[str(hit.document_id)] = "its gradient is not finite"
        kept = [i for i, good in enumerate(finite) if good]
        records = make_records(atoms[kept], [hits[i].text for i in kept], bank.space, codec)
        bank.put((hits[i], record) for i, record in zip(kept, records, strict=True))
        report.atoms_written += len(kept)
        report.truncated += sum(documents[i].truncated for i in kept)
        report.tokens += sum(len(documents[i].ids) for i in kept)
        on_progress(len(batch))


def _pages(hits: Iterator[Hit]) -> Iterator[list[Hit]]:
    page: list[Hit] = []
    for hit in hits:
        page.append(hit)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page
