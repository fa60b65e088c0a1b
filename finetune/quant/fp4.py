"""FP4: a 4-bit float of one sign, two exponent and one mantissa bit, as bitsandbytes has it.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 4, compares it with NF4, which is the better of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.quant.base import QUANTIZERS
from finetune.quant.codebook4 import build_codebook4
from finetune.quant.codebook4_storage import Codebook4Config


@dataclass
class FP4Config(Codebook4Config):
    """FP4 storage: settings as in `Codebook4Config`."""

    name: str = "fp4"


QUANTIZERS.register(FP4Config)(build_codebook4)
