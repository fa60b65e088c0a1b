"""P-tuning v2: deep prompts, trained keys and values before those of the text, in every block.

Liu et al. 2022 (arXiv:2110.07602) section 3: prefix tuning for understanding. The keys and values are trained as they
are (a reparametrisation helps some tasks and hurts others, section 3.3), with a head for the task, which trains beside
them, in place of a verbaliser.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.adapters.base import ADAPTERS
from finetune.adapters.key_value import KeyValueConfig, attach_key_values


@dataclass
class PTuningV2Config(KeyValueConfig):
    """P-tuning v2."""

    name: str = "p_tuning_v2"
    learning_rate: float = 0.002


ADAPTERS.register(PTuningV2Config)(attach_key_values)
