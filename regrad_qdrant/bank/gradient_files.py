"""Gradients that others have computed, from files into a bank.

One `.pt` file a document, its name without the ending being the document's id: a mapping from the names of LoRA
parameters (`…model.layers.8.mlp.up_proj.lora_A.default.weight`) to tensors, as the paper's authors write them. Only
tensors are read from it; no object is unpickled.
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Hit, point_id
from regrad_qdrant.bank.ingest import IngestReport, check_space, put_what_fits
from regrad_qdrant.errors import DataError, InitializationError

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_qdrant.model.initialization import MetaInitialization

TOGETHER = 32  # files that are read before their atoms are written

_NAME = re.compile(r"(.+)\.(lora_[AB])(?:\..*)?")


def gradient_files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it.

    Raises:
        DataError: if there is none, or two are of one document.
    """
    files = sorted(folder.rglob("*.pt"))
    if not files:
        raise DataError(f"{folder}: no .pt file in it")
    if len(of_document := {file.stem: file for file in files}) < len(files):
        first = next(file for file in files if of_document[file.stem] != file)
        raise DataError(f"{first} and {of_document[first.stem]} are of one document, {first.stem!r}: leave one of them")
    return files


def put_gradients(
    bank: GradientBank,
    initialization: MetaInitialization,
    files: Sequence[Path],
    codec: str,
    on_progress: Callable[[int, int], None] = lambda _files, _bytes: None,
    *,
    replace: bool = False,
) -> IngestReport:
    """Attach the gradient of every file to its document's point, coded.

    What a file holds must be the gradient at this initialization's own φ₀: nothing in it says so. A file without a
    point, or of other shapes, is named in the report, and the others go on.

    Args:
        on_progress: called with the number of files just dealt with, and the bytes written for them.
        replace: write over atoms of other spaces under the same payload key.

    Raises:
        InitializationError: for one whose space is not `lora`.
    """
    if initialization.kind != "lora":
        raise InitializationError(
            f"gradients of A and B belong to the space lora; this initialization's is {initialization.kind}"
        )
    get_codec(codec)
    check_space(bank, initialization.space, replace=replace)
    report, started = IngestReport(), time.perf_counter()
    for at in range(0, len(files), TOGETHER):
        part = files[at : at + TOGETHER]
        hits = _points_of(bank, part)
        pairs: list[tuple[Hit, Record]] = []
        for file in part:
            hit = hits.get(file.stem)
            if hit is None or not hit.text:
                report.skipped[file.stem] = f"no point of the collection has this id and a text ({file})"
                continue
            try:
                gradient = read_gradient(file, initialization)
            except DataError as error:
                report.skipped[file.stem] = str(error)
                continue
            layout = initialization.space.layout
            [record] = make_records(gradient[None], [hit.text], initialization.fingerprint, codec, layout)
            pairs.append((hit, record))
        sent = put_what_fits(bank, pairs, report)
        size = sum(record.payload_bytes for _, record in sent)
        arrived = bank.count_current([hit.id for hit, _ in sent])
        report.atoms_written += arrived
        report.passed_over += len(sent) - arrived
        report.bytes_written += size
        on_progress(len(part), size)
    report.seconds = time.perf_counter() - started
    return report


def read_gradient(file: Path, initialization: MetaInitialization) -> Tensor:
    """A file's gradient as a flat atom (numel,) float32.

    Raises:
        DataError: if the file can't be read, or does not hold every tensor of the space in its shape.
    """
    import torch

    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{file} can't be read as tensors: {str(error).splitlines()[0]}") from error
    found = dict(_named(state, list(initialization.modules)))
    shapes = initialization.space.shapes
    wrong = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
    if wrong:
        has = tuple(found[wrong[0]].shape) if wrong[0] in found else "nothing"
        raise DataError(f"{file}: {wrong[0]} must have the shape {shapes[wrong[0]]}; there is {has}")
    flat = initialization.space.flatten({name: tensor[None].float() for name, tensor in found.items()})[0]
    if not bool(flat.isfinite().all()):
        raise DataError(f"{file}: the gradient is not finite")
    return flat


def _named(state: Any, modules: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under our names: whatever stands before a module's name is PEFT's."""
    import torch

    for key, tensor in state.items() if isinstance(state, Mapping) else ():
        match = _NAME.fullmatch(str(key))
        if match is None or not isinstance(tensor, torch.Tensor):
            continue
        module = next((name for name in modules if match[1] == name or match[1].endswith(f".{name}")), None)
        if module is not None:
            yield f"{module}.{match[2]}", tensor


def _points_of(bank: GradientBank, files: Sequence[Path]) -> dict[str, Hit]:
    """The points by their files' names: the id that a document of that name gets, or a number that is a point's own."""
    names = {point_id(file.stem): file.stem for file in files}
    names |= {int(file.stem): file.stem for file in files if file.stem.isdecimal()}
    return {names[hit.id]: hit for hit in bank.fetch(list(names), with_records=False) if hit.id in names}
