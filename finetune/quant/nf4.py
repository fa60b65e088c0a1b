"""NF4: 4-bit NormalFloat, levels at the quantiles of a normal distribution.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.quant.base import QUANTIZERS
from finetune.quant.codebook4 import build_codebook4
from finetune.quant.codebook4_storage import Codebook4Config


@dataclass
class NF4Config(Codebook4Config):
    """NF4 storage: settings as in `Codebook4Config`."""

    name: str = "nf4"


QUANTIZERS.register(NF4Config)(build_codebook4)
