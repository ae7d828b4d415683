"""The record: what stands under the payload key of a point.

    {"v": 1, "space": "<fingerprint>", "sha": "<of the text>", "codec": "sign", "atom": "<base64 text>"}
    {"v": 2, …, "atoms": ["<base64 text>", …], "spans": [[0, 812], …]}    of a text longer than one gradient sees

`atom` is base64(zstd(msgpack({part: bytes}))). Reading one trusts nothing: the size that the frame declares is
checked before a byte is decompressed, zstd's own checksum guards the content, and msgpack yields bytes only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgpack
import zstandard

from regrad_qdrant.atoms.codec import AtomLayout, Codec
from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.errors import (
    CorruptRecordError,
    OversizedRecordError,
    RecordError,
    RecordVersionError,
    TruncatedRecordError,
    WrongShapeError,
    WrongSpaceError,
)

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WINDOWED = 2  # the version of records that hold an atom for each window of a long text
VERSIONS = (VERSION, WINDOWED)
DEFAULT_KEY = "regrad"
ENVELOPE_BYTES = 256  # of msgpack around the parts, at most
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Record:
    """One stored atom, still packed; of a long text one for each of its windows."""

    space: str  # fingerprint of the meta-initialization
    sha: str  # text_sha of the text that it was computed from
    codec: str
    atom: str  # base64 text; of several windows the first one's
    rest: tuple[str, ...] = ()  # the other windows' atoms
    spans: tuple[tuple[int, int], ...] = ()  # of several windows the characters of each: first, and one past the last

    def to_payload(self) -> dict[str, Any]:
        """The value for the payload key."""
        shared = {"space": self.space, "sha": self.sha, "codec": self.codec}
        if not self.rest:
            return {"v": VERSION, **shared, "atom": self.atom}
        return {"v": WINDOWED, **shared, "atoms": [self.atom, *self.rest], "spans": [list(span) for span in self.spans]}

    def windows(self) -> list[Record]:
        """A record of each window's atom; of a text that is one window, this one alone."""
        if not self.rest:
            return [self]
        return [Record(self.space, self.sha, self.codec, atom) for atom in (self.atom, *self.rest)]

    @property
    def payload_bytes(self) -> int:
        """What it takes in the payload, as JSON."""
        return len(json.dumps(self.to_payload()))

    @classmethod
    def from_payload(cls, value: Any) -> Record:
        """Check the fields of a payload value; the atom stays packed.

        Raises:
            RecordVersionError: for a record of another version.
            RecordError: for a value that is no record.
        """
        if not isinstance(value, Mapping):
            raise RecordError(
                f"expected a record (an object with v, space, sha, codec, atom), found {type(value).__name__}"
            )
        if value.get("v") not in VERSIONS or isinstance(value.get("v"), bool):
            raise RecordVersionError(
                f"the record has version {value.get('v')!r}, this regrad-qdrant reads versions "
                f"{' and '.join(map(str, VERSIONS))}"
            )
        atoms, spans = _windows_of(value) if value["v"] == WINDOWED else ([value.get("atom")], ())
        fields = {**{name: value.get(name) for name in ("space", "sha", "codec")}, "atom": atoms[0]}
        wrong = [name for name, text in fields.items() if not isinstance(text, str)]
        if wrong:
            raise RecordError(f"the record's fields {', '.join(wrong)} are missing or no text")
        texts = {name: str(text) for name, text in fields.items()}
        return cls(**texts, rest=tuple(map(str, atoms[1:])), spans=spans)

    def parts(self, fingerprint: str, layout: AtomLayout) -> dict[str, bytes]:
        """Unpack the codec's parts of an atom of this layout, within the memory that these can take. Of several windows
        these are the first one's: `windows` has them apart.

        Raises:
            WrongSpaceError: if the atom was computed in another space than `fingerprint`.
            RecordError: one of its kinds, if the record is damaged.
        """
        if self.space != fingerprint:
            raise WrongSpaceError(
                f"the atom belongs to space {self.space}, the initialization in use to {fingerprint}: ingest the "
                "collection with this initialization, or load the one that made the atom"
            )
        limit = get_codec(self.codec).size(layout) + ENVELOPE_BYTES
        return _unpack(_decompress(_from_base64(self.atom, limit), limit), limit)

    def decode(self, fingerprint: str, layout: AtomLayout) -> Tensor:
        """The atom's numbers (numel,) float32; of several windows their mean.

        Raises:
            WrongSpaceError: if the atom was computed in another space than `fingerprint`.
            RecordError: one of its kinds, if the record is damaged.
        """
        windows = self.windows()
        if len(windows) > 1:
            return decode_sum([self], [1.0], fingerprint, layout)
        return finite(get_codec(self.codec).decode(self.parts(fingerprint, layout), layout))

    def recoded(self, codec: str, fingerprint: str, layout: AtomLayout) -> Record:
        """The same atom in another codec.

        Raises:
            RecordError: as `decode`.
        """
        import torch

        flat = torch.stack([window.decode(fingerprint, layout) for window in self.windows()])
        atom, *rest = map(_pack, get_codec(codec).encode(flat, layout))
        return replace(self, codec=codec, atom=atom, rest=tuple(rest))


def weighted(records: Sequence[Record], weights: Sequence[float] | None) -> list[tuple[Record, float]]:
    """Each record with its weight wᵢ, 1 by default.

    Raises:
        WrongShapeError: if there are not as many of both.
    """
    if weights is None:
        weights = [1.0] * len(records)
    if len(weights) != len(records):
        raise WrongShapeError(f"{len(weights)} weights for {len(records)} records")
    return list(zip(records, weights, strict=True))


def decode_sum(
    records: Sequence[Record],
    weights: Sequence[float] | None,
    fingerprint: str,
    layout: AtomLayout,
    device: Any = None,
) -> Tensor:
    """Σ wᵢ·g(dᵢ) of the records, (numel,) float32 on `device`; zeros for no records. A record of several windows
    counts with their mean: `windows` has them apart.

    Every record is unpacked and checked before the first is decoded. They may be of several codecs.

    Raises:
        RecordError: as `Record.decode` and `weighted`.
    """
    import torch

    by_codec: dict[str, list[tuple[dict[str, bytes], float]]] = {}
    for record, weight in weighted(records, weights):
        windows = record.windows()
        of_codec = by_codec.setdefault(record.codec, [])
        of_codec += [(window.parts(fingerprint, layout), weight / len(windows)) for window in windows]
    total = torch.zeros(layout.numel, device=device)
    for name, atoms in by_codec.items():
        parts, of_parts = zip(*atoms, strict=True)
        total += get_codec(name).decode_sum(parts, of_parts, layout, device)
    return finite(total)


def finite(atom: Tensor) -> Tensor:
    """The same atom, or sum of atoms.

    Raises:
        CorruptRecordError: if a number of it is not finite.
    """
    if not bool(atom.isfinite().all()):
        raise CorruptRecordError("the atom decodes to numbers that are not finite: ingest its document again")
    return atom


def make_records(
    flat: Tensor,
    texts: Sequence[str],
    fingerprint: str,
    codec: str,
    layout: AtomLayout | None = None,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[Record]:
    """Records of a batch of atoms and the texts that they were computed from.

    Args:
        flat: (batch, numel), one for each text; or one for each of its windows, text by text.
        layout: of the atoms' space; without one, the numbers have no structure that a codec could use.
        spans: of each text, the characters of each window.
    """
    layout = layout or AtomLayout.flat(flat.shape[1])
    coder: Codec = get_codec(codec)
    packed = map(_pack, coder.encode(flat, layout))
    records = []
    for text, of_text in zip(texts, spans or [[(0, 0)]] * len(texts), strict=True):
        atom, *rest = itertools.islice(packed, len(of_text))
        records.append(Record(fingerprint, text_sha(text), codec, atom, tuple(rest), tuple(of_text) if rest else ()))
    return records


def _windows_of(value: Mapping[str, Any]) -> tuple[list[Any], tuple[tuple[int, int], ...]]:
    """The atoms and spans of a record of several windows.

    Raises:
        RecordError: if they are not several, or do not fit each other.
    """
    atoms, spans = value.get("atoms"), value.get("spans")
    good = isinstance(atoms, list) and isinstance(spans, list) and len(atoms) == len(spans) > 1
    if good and all(isinstance(atom, str) for atom in atoms or ()):
        found = [tuple(span) for span in spans or () if isinstance(span, list) and list(map(type, span)) == [int, int]]
        if len(found) == len(spans or ()) and all(0 <= start <= end for start, end in found):
            return atoms or [], tuple((start, end) for start, end in found)
    raise RecordError("the record's atoms and spans are missing, or do not fit each other")


def text_sha(text: str) -> str:
    """16 hex digits of the SHA-256 of the text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _pack(parts: Mapping[str, bytes]) -> str:
    packed = msgpack.packb(dict(parts), use_bin_type=True)
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(packed)
    return base64.b64encode(compressed).decode("ascii")


def _from_base64(atom: str, limit: int) -> bytes:
    if len(atom) > 2 * limit + 1024:  # base64 adds a third, and zstd never adds as much again
        raise OversizedRecordError(
            f"the atom's text has {len(atom)} characters; its space needs at most {2 * limit + 1024}"
        )
    if not atom or len(atom) % 4:
        raise TruncatedRecordError(
            f"the atom's base64 text has {len(atom)} characters, no multiple of 4: it was cut short"
        )
    try:
        return base64.b64decode(atom, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptRecordError(f"the atom is not base64 text: {error}") from error


def _decompress(data: bytes, limit: int) -> bytes:
    try:
        declared = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        kind = TruncatedRecordError if len(data) < 18 else CorruptRecordError
        raise kind(f"the atom holds no zstd frame ({len(data)} bytes): {error}") from error
    if declared.content_size > limit or declared.window_size > max(2 * limit, 1024):
        raise OversizedRecordError(f"the atom declares {declared.content_size} bytes, its space needs at most {limit}")
    try:  # into as many bytes as are declared: a frame that holds more ends there
        content: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _reason(data, declared.content_size) from error
    if len(content) != declared.content_size:
        raise TruncatedRecordError(f"the atom ends after {len(content)} of {declared.content_size} bytes")
    return content


def _reason(data: bytes, size: int) -> RecordError:
    """Why a frame that declares so many bytes can't be decompressed; no more than that many are made."""
    corrupt = CorruptRecordError("the atom does not match its checksum, or is no zstd frame of the size it declares")
    try:
        content = zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
        if len(content) > size:
            return corrupt
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        decompressor.decompress(data)
    except zstandard.ZstdError:
        return corrupt
    if decompressor.unused_data:
        return CorruptRecordError(f"{len(decompressor.unused_data)} bytes follow the atom's zstd frame")
    return TruncatedRecordError(f"the atom ends after {len(content)} of {size} bytes")


def _unpack(content: bytes, limit: int) -> dict[str, bytes]:
    try:
        parts = msgpack.unpackb(
            content, raw=False, max_bin_len=limit, max_str_len=64, max_map_len=8, max_array_len=0, max_ext_len=0
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CorruptRecordError(f"the atom's content is not the msgpack that was written: {error}") from error
    if not isinstance(parts, dict) or not all(isinstance(k, str) and isinstance(v, bytes) for k, v in parts.items()):
        raise WrongShapeError("the atom's content is no map of named byte strings")
    return parts
