import base64
import tracemalloc

import msgpack
import pytest
import torch
import zstandard

from regrad_qdrant import errors
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import Record, make_records, text_sha

NUMEL = 500
LAYOUT = AtomLayout.flat(NUMEL)
SPACE = "0123456789abcdef"


@pytest.fixture
def record():
    torch.manual_seed(0)
    return make_records(torch.randn(1, NUMEL), ["a text"], SPACE, "int4")[0]


def packed(content: bytes) -> str:
    return base64.b64encode(zstandard.ZstdCompressor(write_checksum=True).compress(content)).decode()


def with_atom(record, atom):
    return Record.from_payload(record.to_payload() | {"atom": atom})


def test_survives_the_way_through_a_json_payload(record):
    import json

    again = Record.from_payload(json.loads(json.dumps(record.to_payload())))
    assert again == record
    assert torch.equal(again.decode(SPACE, LAYOUT), record.decode(SPACE, LAYOUT))
    assert again.sha == text_sha("a text")


def test_bytes_are_the_same_each_time():
    flat = torch.arange(NUMEL).float().unsqueeze(0)
    assert make_records(flat, ["t"], SPACE, "int4") == make_records(flat, ["t"], SPACE, "int4")


@pytest.mark.parametrize("value", [None, "text", [1], {}, {"v": 2}, {"v": True}, {"v": "1"}])
def test_no_record_or_another_version(value):
    with pytest.raises((errors.RecordVersionError, errors.RecordError)):
        Record.from_payload(value)


def test_missing_fields_are_named(record):
    value = record.to_payload()
    del value["sha"]
    with pytest.raises(errors.RecordError, match="sha"):
        Record.from_payload(value | {"codec": 4})


def test_wrong_space_names_both(record):
    with pytest.raises(errors.WrongSpaceError, match="f{16}"):
        record.decode("f" * 16, LAYOUT)


def test_unknown_codec(record):
    with pytest.raises(errors.UnknownCodecError):
        Record.from_payload(record.to_payload() | {"codec": "int3"}).decode(SPACE, LAYOUT)


@pytest.mark.parametrize("length", [0, 1, 4, 16, 40, 200, -4, -1])
def test_truncated(record, length):
    with pytest.raises((errors.TruncatedRecordError, errors.CorruptRecordError)) as caught:
        with_atom(record, record.atom[:length]).decode(SPACE, LAYOUT)
    if length not in (16, 40):  # so short that zstd can't tell a cut from damage
        assert caught.type is errors.TruncatedRecordError


def test_every_flipped_bit_is_refused(record):
    data = bytearray(base64.b64decode(record.atom))
    for position in range(0, 8 * len(data), 13):
        data[position // 8] ^= 1 << position % 8
        with pytest.raises(errors.RecordError):
            with_atom(record, base64.b64encode(data).decode()).decode(SPACE, LAYOUT)
        data[position // 8] ^= 1 << position % 8


def test_a_flip_in_the_content_is_called_corrupt(record):
    data = bytearray(base64.b64decode(record.atom))
    data[len(data) // 2] ^= 1
    with pytest.raises(errors.CorruptRecordError):
        with_atom(record, base64.b64encode(data).decode()).decode(SPACE, LAYOUT)


def test_text_that_is_not_base64_is_corrupt(record):
    with pytest.raises(errors.CorruptRecordError, match="base64"):
        with_atom(record, "!" + record.atom[1:]).decode(SPACE, LAYOUT)


def test_wrong_shape(record):
    with pytest.raises(errors.WrongShapeError):
        record.decode(SPACE, AtomLayout.flat(NUMEL - 64))
    with pytest.raises(errors.WrongShapeError):
        with_atom(record, packed(msgpack.packb({"codes": b"1"}))).decode(SPACE, LAYOUT)
    with pytest.raises(errors.WrongShapeError):
        with_atom(record, packed(msgpack.packb({"codes": 5}))).decode(SPACE, LAYOUT)


def test_a_bomb_is_refused_before_it_is_decompressed(record):
    bomb = packed(msgpack.packb({"codes": bytes(200_000_000)}))
    assert len(bomb) < 100_000
    with pytest.raises(errors.OversizedRecordError):
        with_atom(record, bomb).decode(SPACE, LAYOUT)


def test_a_frame_that_holds_more_than_it_declares_is_never_held_whole(record):
    block = (1 << 1 | 1024 << 3).to_bytes(3, "little") + b"0"  # a kibibyte of zeros in four bytes
    header = zstandard.FRAME_HEADER + bytes([0x80, 0]) + (500).to_bytes(4, "little")  # 500 bytes, a window of 1 KiB
    blocks = block * 250
    liar = with_atom(record, base64.b64encode(header + blocks + b"0" * (-len(header + blocks) % 3)).decode())
    tracemalloc.start()
    with pytest.raises(errors.CorruptRecordError):
        liar.decode(SPACE, LAYOUT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_frame_that_hides_its_size_is_refused(record):
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    hidden = base64.b64encode(compressor.compress(msgpack.packb({"codes": bytes(10_000_000)}))).decode()
    with pytest.raises(errors.RecordError):
        with_atom(record, hidden).decode(SPACE, LAYOUT)


def test_a_very_long_text_is_refused_unread(record):
    with pytest.raises(errors.OversizedRecordError):
        with_atom(record, "A" * 10_000_000).decode(SPACE, LAYOUT)


def test_content_that_is_no_msgpack_or_nests_is_refused(record):
    for content in (b"\xc1", b"\xdd\xff\xff\xff\xff", msgpack.packb([[]] * 100), msgpack.packb({"codes": [1] * 9})):
        with pytest.raises(errors.RecordError):
            with_atom(record, packed(content)).decode(SPACE, LAYOUT)
