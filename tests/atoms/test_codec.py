import hashlib
import importlib.util
import math

import pytest
import torch

from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.codecs.levels import ROTATED_BLOCK
from regrad_qdrant.atoms.codecs.low_rank import LowRank
from regrad_qdrant.atoms.codecs.registry import CODECS, get_codec
from regrad_qdrant.errors import UnknownCodecError, WrongShapeError

ERROR = {"fp32": 0.0, "fp16": 1e-3, "int8": 0.02, "int4": 0.2, "nf4": 0.2}
COSINE = {"int2": 0.93, "ternary": 0.88, "sign": 0.78, "sparse": 0.5}  # of normal numbers
BITS = {"int2": 2, "ternary": 1.625, "sign": 1, "sparse": 0.5625}
NAMES = [name for name in CODECS if name != "nf4" or importlib.util.find_spec("bitsandbytes")]


def atoms(numel, batch=3):
    torch.manual_seed(0)
    return torch.randn(batch, numel) * torch.tensor([[1.0], [1e-6], [1e4]])[:batch]


@pytest.mark.parametrize("name", [name for name in NAMES if name in ERROR])
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
def test_decodes_to_what_was_encoded_whatever_its_scale(name, numel):
    codec, flat = get_codec(name), atoms(numel)
    for parts, expected in zip(codec.encode(flat, AtomLayout.flat(flat.shape[1])), flat, strict=True):
        assert {part: len(data) for part, data in parts.items()} == codec.sizes(AtomLayout.flat(numel))
        found = codec.decode(parts, AtomLayout.flat(numel))
        assert (found - expected).norm() <= ERROR[name] * expected.norm()


@pytest.mark.parametrize("name", COSINE)
def test_below_four_bits_the_direction_is_kept_as_well_as_theory_says(name):
    codec, flat = get_codec(name), atoms(4 * ROTATED_BLOCK)
    for parts, expected in zip(codec.encode(flat, AtomLayout.flat(flat.shape[1])), flat, strict=True):
        assert {part: len(data) for part, data in parts.items()} == codec.sizes(AtomLayout.flat(len(expected)))
        assert (
            torch.cosine_similarity(codec.decode(parts, AtomLayout.flat(len(expected))), expected, dim=0)
            >= COSINE[name]
        )


@pytest.mark.parametrize("name", COSINE)
def test_nothing_is_lost_along_the_atom_itself(name):
    """⟨decoded, atom⟩ = |atom|², so that the noise of a sum averages out and its length stays."""
    codec, flat, layout = get_codec(name), atoms(4 * ROTATED_BLOCK), AtomLayout.flat(4 * ROTATED_BLOCK)
    decoded = codec.dequantize(codec.quantize(flat, layout), layout)
    torch.testing.assert_close((decoded * flat).sum(1) / flat.square().sum(1), torch.ones(3), rtol=0.03, atol=0)


def test_what_atoms_share_comes_out_of_their_sum_better_than_out_of_one():
    codec, layout = get_codec("sign"), AtomLayout.flat(1024)
    torch.manual_seed(1)
    common = torch.randn(1, 1024)
    flat = common + torch.randn(64, 1024)
    total = codec.dequantize(codec.quantize(flat, layout), layout).sum(0)
    one = codec.dequantize(codec.quantize(flat[:1], layout), layout)[0]
    assert torch.cosine_similarity(total, flat.sum(0), dim=0) > 0.95
    assert torch.cosine_similarity(one, flat[0], dim=0) < 0.85


@pytest.mark.parametrize("name", COSINE)
def test_coded_size(name):
    numel = 180 * ROTATED_BLOCK
    size = sum(get_codec(name).sizes(AtomLayout.flat(numel)).values())
    assert size == math.ceil(numel * BITS[name] / 8) + 180 + 2  # a byte a block for its scale


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_coded_as_its_atoms_one_by_one(name):
    codec, flat = get_codec(name), atoms(1300)
    assert codec.encode(flat, AtomLayout.flat(flat.shape[1])) == [
        codec.encode(row.unsqueeze(0), AtomLayout.flat(1300))[0] for row in flat
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nf4"])
def test_coding_a_decoded_atom_again_gives_the_same_bytes(name):
    codec, layout = get_codec(name), AtomLayout.flat(4 * ROTATED_BLOCK)
    for parts in codec.encode(atoms(layout.numel), layout):
        assert codec.encode(codec.decode(parts, layout).unsqueeze(0), layout) == [parts]


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_sum_is_the_sum_of_the_decoded_atoms(name):
    codec, flat, weights = get_codec(name), atoms(600)[:1].repeat(3, 1).roll(1, 1) * torch.rand(3, 600), [1.0, 0.5, -2]
    layout = AtomLayout.flat(600)
    parts = codec.encode(flat, layout)
    expected = sum(w * codec.decode(p, layout) for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(codec.decode_sum(parts, weights, layout), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    codec, layout = get_codec(name), AtomLayout.flat(1000)
    flat = torch.zeros(2, 1000)
    flat[1, :ROTATED_BLOCK] = torch.randn(ROTATED_BLOCK)  # blocks of zeros beside one that is not
    zeros, partly = codec.encode(flat, layout)
    assert torch.equal(codec.decode(zeros, layout), torch.zeros(1000))
    assert not codec.decode(partly, layout)[ROTATED_BLOCK:].any() and codec.decode(partly, layout).any()


def test_the_bytes_are_the_same_everywhere():
    """A bank outlives the machine and the version that wrote it."""
    flat = (torch.arange(600, dtype=torch.float64) * 0.7).sin().float().unsqueeze(0)
    found = {
        name: hashlib.sha256(b"".join(get_codec(name).encode(flat, AtomLayout.flat(600))[0].values())).hexdigest()[:8]
        for name in CODECS
        if name != "nf4" and "-rank" not in name  # their factors are of the machine's own linear algebra
    }
    assert found == {
        "fp32": "3044ac5f",
        "fp16": "c7071a27",
        "int8": "08228c72",
        "int4": "a72c0a91",
        "int2": "7088e4df",
        "ternary": "85da3311",
        "sign": "1502e251",
        "sparse": "aba6aa51",
    }


LAYOUT = AtomLayout(((60, 90), (3, 5), (90, 60)))  # two matrices to factor, and one too small for it between them


def of_rank(rank, batch=3):
    """Atoms whose matrices have this rank exactly."""
    torch.manual_seed(0)
    parts = [torch.randn(batch, m, rank) @ torch.randn(batch, rank, n) for m, n in LAYOUT.matrices]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def test_low_rank_keeps_the_leading_singular_vectors():
    torch.manual_seed(0)
    codec, flat = LowRank(get_codec("fp32"), 8), torch.randn(3, LAYOUT.numel)
    decoded = codec.dequantize(codec.quantize(flat, LAYOUT), LAYOUT)
    sizes = [rows * columns for rows, columns in LAYOUT.matrices]
    for shape, found, exact in zip(LAYOUT.matrices, decoded.split(sizes, 1), flat.split(sizes, 1), strict=True):
        left, values, right = torch.linalg.svd(exact.unflatten(1, shape), full_matrices=False)
        best = (left[..., :8] * values[:, None, :8]) @ right[:, :8]
        assert torch.dist(exact, found) <= 1.02 * torch.dist(exact, best.flatten(1)) + 1e-4


def test_low_rank_loses_nothing_of_an_atom_of_that_rank_whatever_its_scale():
    codec = LowRank(get_codec("fp32"), 8)
    flat = of_rank(6) * torch.tensor([[1.0], [1e-9], [1e6]])
    for parts, expected in zip(codec.encode(flat, LAYOUT), flat, strict=True):
        assert {part: len(data) for part, data in parts.items()} == codec.sizes(LAYOUT)
        assert (codec.decode(parts, LAYOUT) - expected).norm() <= 1e-4 * expected.norm()


def test_low_rank_factors_are_what_the_other_codec_codes():
    codec = get_codec("sign-rank8")
    numbers = 8 * (60 + 90) + 3 * 5 + 8 * (90 + 60)
    assert codec.sizes(LAYOUT) == get_codec("sign").sizes(AtomLayout.flat(numbers))
    parts = codec.encode(of_rank(3), LAYOUT)
    weights = [1.0, 0.5, -2.0]
    expected = sum(w * codec.decode(p, LAYOUT) for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(codec.decode_sum(parts, weights, LAYOUT), expected, rtol=1e-4, atol=1e-4)
    assert torch.cosine_similarity(codec.decode(parts[0], LAYOUT), of_rank(3)[0], dim=0) > 0.55


def test_the_gradient_of_what_low_rank_keeps_is_that_of_the_truncated_product():
    """Where the other singular values are zero, what moves along the matrices of the rank is kept whole."""
    codec, flat = LowRank(get_codec("fp32"), 8), of_rank(8).requires_grad_(True)
    kept = codec.truncated(flat, LAYOUT)
    torch.testing.assert_close(kept, flat, rtol=1e-3, atol=1e-3)
    torch.manual_seed(1)
    [along] = torch.autograd.grad((kept * torch.randn_like(kept)).sum(), flat)
    [again] = torch.autograd.grad((codec.truncated(flat, LAYOUT) * along).sum(), flat)
    torch.testing.assert_close(again, along, rtol=1e-3, atol=1e-3)  # a projection
    step = 0.01 * along
    torch.testing.assert_close(codec.truncated(flat + step, LAYOUT) - flat, step, rtol=0.05, atol=0.01)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        get_codec("int4").encode(torch.tensor([[1.0, float("nan")]]), AtomLayout.flat(2))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_another_size_are_refused(name):
    codec = get_codec(name)
    [parts] = codec.encode(atoms(64)[:1], AtomLayout.flat(64))
    with pytest.raises(WrongShapeError):
        codec.decode(parts, AtomLayout.flat(65 * 64))
    with pytest.raises(WrongShapeError):
        codec.decode({}, AtomLayout.flat(64))


def test_an_unknown_codec_is_named_with_the_known_ones():
    with pytest.raises(UnknownCodecError, match="int4"):
        get_codec("int3")
