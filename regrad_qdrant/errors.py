"""The exceptions of regrad-qdrant; every one says what was found, what was expected and what mends it.

RegradError
├── MissingExtraError         a part whose optional dependencies are not installed
├── DataError                 a corpus, a question or a text that can't be used
│   └── ContextLengthError    … or a prompt and an answer that are more than the model's context
├── InitializationError       a meta-initialization that is missing or damaged
│   ├── WrongModelError       … or that was trained for another base model
│   └── UnsupportedModelError … or a base model whose losses or layers can't be followed
├── RecordError               a payload value that is no usable knowledge atom
│   ├── RecordVersionError    written by another version of the record's format
│   ├── WrongSpaceError       computed in another atom space
│   ├── StaleAtomError        computed from another text than the point now holds
│   ├── UnknownCodecError     coded by a codec that this version does not know
│   ├── TruncatedRecordError  cut short, or not base64 and zstd at all
│   ├── CorruptRecordError    the bytes do not match their own checksum
│   ├── OversizedRecordError  would decode to more than its space holds
│   └── WrongShapeError       decodes to other tensors than its space says
├── BankError                 a collection that is missing, or lacks what was asked of it
│   ├── StoreUnavailableError the server or folder can't be reached
│   ├── UnindexedFilterError  strict mode refuses a filter on a field without an index
│   └── RecordTooLargeError   one record is larger than a request may be
└── AdapterError              an update that can't be applied
    └── AdapterInUseError     … since one is applied already
"""

from __future__ import annotations


class RegradError(Exception):
    """Root of every error that this library raises on purpose."""


class MissingExtraError(RegradError, ImportError):
    """A part whose optional dependencies are not installed; the message names the extra."""


class DataError(RegradError, ValueError):
    """A corpus, a question or a text, or a setting that goes with it, that can't be used."""


class ContextLengthError(DataError):
    """A prompt, with the longest answer that may follow it, has more tokens than the model's context."""


class InitializationError(RegradError):
    """A meta-initialization that is missing or damaged."""


class WrongModelError(InitializationError):
    """The meta-initialization was trained for another base model."""


class UnsupportedModelError(InitializationError):
    """The base model computes its loss, or runs its layers, in a way that can't be followed exactly."""


class RecordError(RegradError):
    """A payload value that is no usable knowledge atom."""


class RecordVersionError(RecordError):
    """The record was written in another version of the format."""


class WrongSpaceError(RecordError):
    """The atom was computed in another atom space."""


class StaleAtomError(RecordError):
    """The atom was computed from another text than the point now holds."""


class UnknownCodecError(RecordError):
    """The atom is coded by a codec that this version does not know."""


class TruncatedRecordError(RecordError):
    """The record is cut short, or is not base64 and zstd at all."""


class CorruptRecordError(RecordError):
    """The record's bytes do not match their own checksum."""


class OversizedRecordError(RecordError):
    """The record would decode to more than its space holds."""


class WrongShapeError(RecordError):
    """The record decodes to other tensors than its space says."""


class BankError(RegradError):
    """A collection that is missing, or lacks what was asked of it."""


class StoreUnavailableError(BankError):
    """The server or the folder can't be reached."""


class UnindexedFilterError(BankError):
    """A server in strict mode refuses a filter on a field without an index."""


class RecordTooLargeError(BankError):
    """One record is larger than a request may be; `id` is its point's."""

    def __init__(self, message: str, id: int | str | None = None) -> None:
        super().__init__(message)
        self.id = id


class AdapterError(RegradError):
    """An update that can't be applied to the model."""


class AdapterInUseError(AdapterError):
    """An update is applied already."""
