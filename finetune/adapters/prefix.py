"""Prefix tuning: trained keys and values before those of the text, in every block.

Li & Liang 2021 (arXiv:2101.00190) section 4. While they are trained, they come out of two small layers (section 4.3);
what is saved is what came out. 2 N K L parameters for N blocks whose keys have K features and L virtual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.adapters.base import ADAPTERS
from finetune.adapters.key_value import KeyValueConfig, attach_key_values


@dataclass
class PrefixConfig(KeyValueConfig):
    """Prefix tuning."""

    name: str = "prefix"
    learning_rate: float = 0.0005
    reparametrise: bool = True


ADAPTERS.register(PrefixConfig)(attach_key_values)
