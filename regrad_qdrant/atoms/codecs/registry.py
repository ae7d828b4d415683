"""The registry of codecs: a line each."""

from __future__ import annotations

import importlib.util

from regrad_qdrant.atoms.codec import Codec
from regrad_qdrant.atoms.codecs.floats import Float16, Float32
from regrad_qdrant.atoms.codecs.levels import BLOCK, ROTATED_BLOCK, Levels
from regrad_qdrant.atoms.codecs.low_rank import LowRank
from regrad_qdrant.atoms.codecs.nf4 import NF4
from regrad_qdrant.atoms.codecs.sparse import SparseSign
from regrad_qdrant.errors import UnknownCodecError

_SIGN = Levels("sign", (-1.0, 1.0), ROTATED_BLOCK, rotated=True)
_REGISTERED: tuple[Codec, ...] = (
    Float32(),
    Float16(),
    Levels("int8", range(-127, 128), BLOCK, rotated=False),
    Levels("int4", range(-7, 8), BLOCK, rotated=False),
    NF4(),
    # the levels of least squared error for normal numbers of variance 1 (Max, 1960), which rotation makes of them
    Levels("int2", (-1.510, -0.4528, 0.4528, 1.510), ROTATED_BLOCK, rotated=True),
    Levels("ternary", (-1.224, 0.0, 1.224), ROTATED_BLOCK, rotated=True),
    _SIGN,
    SparseSign(),
    *(LowRank(_SIGN, rank) for rank in (2, 4, 8, 16, 32)),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _REGISTERED}
DEFAULT_CODEC = "sign"  # chosen by the curve: docs/atoms.md


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnknownCodecError: if there is none, or if it needs a package that is not installed.
    """
    if name not in CODECS:
        raise UnknownCodecError(f"codec {name!r} is not one of {', '.join(CODECS)}: a newer regrad-qdrant may know it")
    if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UnknownCodecError("codec 'nf4' needs bitsandbytes: pip install 'regrad-qdrant[bitsandbytes]'")
    return CODECS[name]
