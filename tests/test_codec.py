import importlib.util

import pytest
import torch

from regrad_qdrant.codec import CODECS, get_codec
from regrad_qdrant.errors import UnknownCodecError, WrongShapeError

ERROR = {"fp32": 0.0, "fp16": 1e-3, "int8": 0.02, "int4": 0.2, "nf4": 0.2}
NAMES = [name for name in CODECS if name != "nf4" or importlib.util.find_spec("bitsandbytes")]


def atoms(numel, batch=3):
    torch.manual_seed(0)
    return torch.randn(batch, numel) * torch.tensor([[1.0], [1e-6], [1e4]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
def test_decodes_to_what_was_encoded_whatever_its_scale(name, numel):
    codec, flat = get_codec(name), atoms(numel)
    for parts, expected in zip(codec.encode(flat), flat, strict=True):
        assert {part: len(data) for part, data in parts.items()} == codec.sizes(numel)
        found = codec.decode(parts, numel)
        assert (found - expected).norm() <= ERROR[name] * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_coded_as_its_atoms_one_by_one(name):
    codec, flat = get_codec(name), atoms(130)
    assert codec.encode(flat) == [codec.encode(row.unsqueeze(0))[0] for row in flat]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_coding_a_decoded_atom_again_gives_the_same_codes(name):
    codec = get_codec(name)
    [parts] = codec.encode(atoms(128, 1)[:1])
    [again] = codec.encode(codec.decode(parts, 128).unsqueeze(0))
    assert again["codes"] == parts["codes"]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    codec = get_codec(name)
    [parts] = codec.encode(torch.zeros(1, 70))
    assert torch.equal(codec.decode(parts, 70), torch.zeros(70))


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        get_codec("int4").encode(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_another_size_are_refused(name):
    codec = get_codec(name)
    [parts] = codec.encode(atoms(64)[:1])
    with pytest.raises(WrongShapeError):
        codec.decode(parts, 65 * 64)
    with pytest.raises(WrongShapeError):
        codec.decode({}, 64)


def test_an_unknown_codec_is_named_with_the_known_ones():
    with pytest.raises(UnknownCodecError, match="int4"):
        get_codec("int3")
