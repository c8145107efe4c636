"""Codecs: how the rows of one layer become bytes, by name.

| name | fidelity | 16-bit rows become |
|---|---|---|
| `raw` | exact | what they are |
| `lossless` | exact | about 1.3 to 1.5 times smaller |
| `kivi-int8` | near | 1.78 times smaller |
| `kivi-int4` | lossy | 3.20 times smaller |
| `kivi-int2` | lossy | 5.33 times smaller |
"""

from __future__ import annotations

from tandem.kvstore.codecs.interfaces import DTYPE_BYTES, Codec, Fidelity, LayerShape
from tandem.kvstore.codecs.kivi import KiviCodec
from tandem.kvstore.codecs.lossless import LosslessCodec
from tandem.kvstore.codecs.raw import RawCodec

_ALL: tuple[Codec, ...] = (
    RawCodec(),
    LosslessCodec(),
    KiviCodec(8, Fidelity.NEAR),
    KiviCodec(4, Fidelity.LOSSY),
    KiviCodec(2, Fidelity.LOSSY),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}


def get_codec(name: str) -> Codec:
    """Raises ValueError naming the codecs there are: for settings. Readers of stored bytes look in CODECS."""
    try:
        return CODECS[name]
    except KeyError:
        raise ValueError(f"unknown codec {name!r}; use one of {', '.join(CODECS)}") from None


__all__ = ["CODECS", "DTYPE_BYTES", "Codec", "Fidelity", "KiviCodec", "LayerShape", "get_codec"]
