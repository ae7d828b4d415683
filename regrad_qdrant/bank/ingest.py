"""Ingestion: a corpus, or a collection that exists, to a bank. Resumable: what is there is not computed again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.corpus import Passage, listed
from regrad_qdrant.bank.documents import Document, Hit
from regrad_qdrant.bank.place import SAMPLE
from regrad_qdrant.bank.stores.base import PointId, Without, json_bytes, pages
from regrad_qdrant.errors import BankError, DataError, RecordTooLargeError
from regrad_qdrant.model.gradients import BATCH_TOKENS, EncodedDocument, GradientComputer, batches
from regrad_qdrant.model.memory import give_back_memory

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_qdrant.atoms.record import Record
    from regrad_qdrant.bank.shard import Shard
    from regrad_qdrant.model.space import AtomSpace

LongTexts = Literal["window", "truncate", "skip"]

PAGE = 256  # points looked up at a time; within a page, documents are sorted by length
WAITING = 2  # batches that may wait to be coded and written while the next one's gradients are computed


@dataclass
class IngestReport:
    """What an ingestion did."""

    points_added: int = 0
    points_updated: int = 0  # whose text or fields the corpus has changed
    atoms_written: int = 0
    bytes_written: int = 0  # of those atoms, as they stand in the payload
    passed_over: int = 0  # computed, but the point was gone or changed by then; the next run does them
    present: int = 0  # atoms that were there already and fit their text
    truncated: int = 0  # texts over max_length whose beginning alone the atom is of
    windowed: int = 0  # … that have an atom of each of their windows
    too_long: int = 0  # … that got no atom, as asked (`skip`)
    without_text: int = 0  # points that can have no atom
    skipped: dict[str, str] = field(default_factory=dict)  # document id → why it has no atom
    seconds: float = 0.0  # of gradients, codec and writes

    @property
    def documents_per_second(self) -> float:
        return self.atoms_written / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"documents_per_second": self.documents_per_second}


def add_corpus(bank: GradientBank, passages: Sequence[Passage], gradients: GradientComputer) -> tuple[int, int]:
    """Make the collection if need be, add the passages that are new and update those that have changed.

    Returns how many of each.

    Every passage is checked before anything is written.

    Raises:
        DataError: for a text that can't have a gradient; the collection is as before.
        BankError: as `GradientBank.check_document`, or as `AtomCollection.check_place`; likewise.
    """
    check_passages(bank, passages, gradients)
    bank.create()
    return bank.sync(Document(passage.id, passage.payload) for passage in passages)


def check_passages(bank: GradientBank, passages: Sequence[Passage], gradients: GradientComputer) -> None:
    """Refuse passages that could not be added, or could have no atom, before anything is written.

    Raises:
        DataError, BankError: as `add_corpus`.
    """
    unfit: list[str] = []
    for passage in passages:
        try:
            gradients.encode(passage.text)
        except DataError as error:
            unfit.append(f"passage {passage.id!r}: {error}")
            continue
        bank.check_document(Document(passage.id, passage.payload))
    if unfit:
        raise DataError(f"{listed(unfit)}. Give each a text that can have an atom, or leave it out")


def attach_atoms(
    bank: GradientBank,
    gradients: GradientComputer,
    codec: str,
    on_progress: Callable[[int, int], None] = lambda _points, _bytes: None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    long_texts: LongTexts = "window",
    replace: bool = False,
    shard: Shard | None = None,
) -> IngestReport:
    """Compute and attach the atom of every point that lacks one, or whose text has changed since.

    Args:
        on_progress: called with the number of points just dealt with, and the bytes written for them.
        batch_tokens: bound of one gradient batch, with its padding.
        long_texts: what a text over `max_length` tokens gets: an atom of each of its windows, of which a question
            chooses (`window`), the atom of its beginning (`truncate`), or none (`skip`).
        replace: write over atoms of other spaces under the same payload key.
        shard: only the points of this share; other processes may be at others, or at the same, meanwhile.

    Raises:
        BankError: if there are such atoms, and they are not to be replaced.
    """
    check_options(codec, long_texts)
    check_space(bank, gradients.space, replace=replace)
    report = IngestReport()
    outdated: list[PointId] = []
    for state, hit in bank.examined(shard):
        if state == "current":
            report.present += 1
        else:
            outdated.append(hit.id)
    ingestion = Ingestion(bank, gradients, codec, batch_tokens, long_texts, report, on_progress)
    started = time.perf_counter()
    with ingestion:
        for page in pages(bank.missing(shard), PAGE):
            ingestion.attach(page)
        sent_new = ingestion.sent()
        for ids in pages(outdated, PAGE):
            ingestion.attach(bank.fetch(ids, with_records=False))
        renewed = ingestion.sent()
    report.seconds = time.perf_counter() - started
    arrived = sum(map(bank.count_with_atoms, pages(sent_new, PAGE))) + sum(
        map(bank.count_current, pages(renewed, PAGE))
    )
    report.passed_over = len(sent_new) + len(renewed) - arrived
    report.atoms_written -= report.passed_over
    bank.optimize()
    return report


def put_what_fits(
    bank: Destination, records: Sequence[tuple[Hit, Record]], report: IngestReport
) -> list[tuple[Hit, Record]]:
    """Give points their atoms, but for records that no request can hold, which the report names; returns the others."""
    sent, left = [], list(records)
    while left:
        try:
            bank.put(left)
        except RecordTooLargeError as error:  # those before it are written
            at = next(i for i, (hit, _) in enumerate(left) if hit.id == error.id)
            report.skipped[str(left[at][0].document_id)] = str(error)
            sent += left[:at]
            left = left[at + 1 :]
        else:
            return sent + left
    return sent


def check_options(codec: str, long_texts: str) -> None:
    """Refuse a codec or a way with long texts that is none, before anything is done.

    Raises:
        UnknownCodecError, DataError: for either.
    """
    get_codec(codec)
    if long_texts not in get_args(LongTexts):
        raise DataError(f"long texts: {long_texts!r} is not one of {', '.join(get_args(LongTexts))}")


def check_space(bank: GradientBank, space: AtomSpace, *, replace: bool) -> None:
    """Make a collection ready for atoms of a space: its index, and what is noted of the space beside it.

    Raises:
        BankError: if none of its points has a text, if it has atoms of another space under the same key, and they are
            not to be replaced; or as `AtomCollection.check_place`.
    """
    check_texts(bank)
    bank.index()  # first: a server in strict mode filters by nothing else
    if not replace:
        _refuse_others(bank)
    bank.describe(space)


def check_others(bank: GradientBank, *, replace: bool, index: bool = True) -> None:
    """Refuse a collection with atoms of another space under the same key, before a document of it is changed.

    Args:
        index: make the index first by which they are counted.

    Raises:
        BankError: if it has some, and they are not to be replaced.
    """
    if not replace and bank.atoms.exists():
        if index:
            bank.index()
        _refuse_others(bank)


def windows_of(gradients: GradientComputer, text: str, long_texts: str) -> list[EncodedDocument]:
    """What a text's atoms are computed from: one window or several; none of a long text that is skipped.

    Raises:
        DataError: for a text that can have no atom.
    """
    if long_texts == "window":
        return gradients.windows(text)
    document = gradients.encode(text)
    return [] if document.truncated and long_texts == "skip" else [document]


def _refuse_others(bank: GradientBank) -> None:
    if bank.has_other_spaces():
        raise BankError(
            f"{bank.count_of_other_spaces()} points carry atoms of another space under {bank.payload_key!r}: choose "
            "another payload key (--payload-key NAME) to keep both, or --replace to write over them"
        )


def check_texts(bank: GradientBank) -> None:
    """Refuse a layout that finds no text in any point, before it is noted for later readers.

    Raises:
        BankError: if there are points and none has a text; the error names their fields.
    """
    if any(hit.text for hit in bank.points()):
        return
    points, _ = bank.store.scroll(None, SAMPLE, None, Without((bank.payload_key,)))
    if points:
        fields = sorted({key for point in points for key in point.payload})
        raise BankError(
            f"none of the points has a text for the layout {bank.layout}; their fields are {fields}: name the one with "
            "the text (--text-path PATH, in Python layout=Layout('mine', 'PATH'))"
        )


@dataclass
class _Open:
    """A point whose windows are being computed."""

    hit: Hit
    windows: list[EncodedDocument]
    atoms: dict[int, Tensor] = field(default_factory=dict)  # of the windows that were computed, (numel,) each


class Destination(Protocol):
    """Where atoms go: a bank, or what stands for one."""

    @property
    def space(self) -> str: ...

    @property
    def atoms(self) -> Any:
        """Its store, which says whether one thread must do everything."""

    def put(self, records: Iterable[tuple[Hit, Record]]) -> Any: ...


@dataclass
class Ingestion:
    """Gives pages of points their atoms.

    Where the store allows it, a thread codes and writes what was computed, while the next page is read and the next
    batch's gradients are computed."""

    bank: Destination
    gradients: GradientComputer
    codec: str
    batch_tokens: int
    long_texts: LongTexts
    report: IngestReport
    on_progress: Callable[[int, int], None] = lambda _points, _bytes: None
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "regrad-write"))
    _waiting: deque[Future[list[PointId]]] = field(default_factory=deque)
    _sent: list[PointId] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)

    def sent(self) -> list[PointId]:
        """Whose atoms were sent since it was last asked, when all of them are."""
        while self._waiting:
            self._sent += self._waiting.popleft().result()
        sent, self._sent = self._sent, []
        return sent

    def attach(self, page: Sequence[Hit]) -> None:
        """The atoms of one page of points, batch by batch of windows of like length."""
        windows: list[tuple[_Open, int]] = []
        for hit in page:
            opened = _Open(hit, self._windows(hit))
            windows += [(opened, i) for i in range(len(opened.windows))]
            if not opened.windows:
                self.on_progress(1, 0)
        for batch in batches([len(opened.windows[i].ids) for opened, i in windows], self.batch_tokens):
            chosen = [windows[j] for j in batch]
            whole = []
            for atom, (opened, i) in zip(
                self.gradients.atoms([opened.windows[i] for opened, i in chosen]), chosen, strict=True
            ):
                opened.atoms[i] = atom
                if len(opened.atoms) == len(opened.windows):
                    whole.append(opened)
            if self.bank.atoms.one_thread:
                self._sent += self._put(whole)
            else:
                self._waiting.append(self._writer.submit(self._put, whole))
                while len(self._waiting) > WAITING:
                    self._sent += self._waiting.popleft().result()
            give_back_memory()

    def _windows(self, hit: Hit) -> list[EncodedDocument]:
        """What of a text its atoms are computed from: one window or several; none where it gets no atom."""
        if not hit.text:
            self.report.without_text += 1
            return []
        try:
            windows = windows_of(self.gradients, hit.text, self.long_texts)
        except DataError as error:
            self.report.skipped[str(hit.document_id)] = str(error)
            return []
        self.report.too_long += not windows
        self.report.windowed += len(windows) > 1
        self.report.truncated += any(window.truncated for window in windows) and self.long_texts == "truncate"
        return windows

    def _put(self, whole: Sequence[_Open]) -> list[PointId]:
        size = 0
        finite: list[_Open] = []
        for opened in whole:
            if all(bool(atom.isfinite().all()) for atom in opened.atoms.values()):
                finite.append(opened)
            else:
                self.report.skipped[str(opened.hit.document_id)] = "its gradient is not finite"
        hits = [opened.hit for opened in finite]
        if finite:
            import torch

            flat = torch.stack([opened.atoms[i] for opened in finite for i in range(len(opened.windows))])
            spans = [[window.span for window in opened.windows] for opened in finite]
            texts = [hit.text for hit in hits]
            records = make_records(flat, texts, self.bank.space, self.codec, self.gradients.space.layout, spans)
            written = put_what_fits(self.bank, list(zip(hits, records, strict=True)), self.report)
            hits = [hit for hit, _ in written]
            self.report.atoms_written += len(hits)  # those that the bank passed over are taken off at the end
            size = sum(json_bytes(record.to_payload()) for _, record in written)
            self.report.bytes_written += size
        self.on_progress(len(whole), size)
        return [hit.id for hit in hits]
