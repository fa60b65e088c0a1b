"""Models with virtual tokens before every row, and what they are fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapters_models import frozen, inputs, randomize
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.input import InputAdapter
from finetune.adapters.p_tuning import PTuningConfig
from finetune.adapters.prelayer import PreLayerConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.data.rows import Row, TokenRows

L = 5
KINDS: dict[str, Any] = {
    "prompt_tuning": lambda **s: PromptTuningConfig(**{"prefix_length": L, **s}),
    "lstm": lambda **s: PTuningConfig(**{"prefix_length": L, "encoder": "lstm", "encoder_hidden_size": 24, **s}),
    "mlp": lambda **s: PTuningConfig(**{"prefix_length": L, "encoder": "mlp", **s}),
    "prelayer": lambda **s: PreLayerConfig(**{"prefix_length": L, **s}),
}
IN_PEFT = ("prompt_tuning", "lstm", "mlp")
DECODERS = ("llama", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "gemma", "gemma2")

CASES = [(kind, family) for kind in ("prompt_tuning", "prelayer") for family in DECODERS] + [("lstm", "llama")]
"""The networks of P-tuning give embeddings that go the same way as those of prompt tuning."""

each = pytest.mark.parametrize("kind", list(KINDS))


def attached(kind: str, family: str, quant: str = "dense", **settings: object) -> tuple[Any, InputAdapter]:
    """A frozen model with an adapter that has moved off its start."""
    model = frozen(family, quant)
    torch.manual_seed(3)
    adapter = attach(model, KINDS[kind](**settings))
    randomize(adapter)
    return model, adapter


def padded(side: str, missing: int = 3, length: int = 11) -> Tensor:
    """A mask of two rows, the second of them shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    cut = slice(length - missing, None) if side == "right" else slice(0, missing)
    mask[1, cut] = 0
    return mask


def said(model: nn.Module, mask: Tensor | None, **more: Any) -> Tensor:
    """Logits where the mask has tokens, as far as they have columns."""
    fed = inputs(model) | more | ({} if mask is None else {"attention_mask": mask})
    with torch.no_grad():
        found = model(**fed).logits
    if found.dim() == 3 and found.shape[1] == L + fed["input_ids"].shape[1]:
        found = found[:, L:]
    columns = found.dim() == 3 and found.shape[1] == fed["input_ids"].shape[1]
    return found[mask.bool()] if mask is not None and columns else found


def rows_of(lengths: tuple[int, ...]) -> TokenRows:
    """Rows of random tokens, all of them learnt."""
    generator = np.random.default_rng(0)
    return TokenRows.of([Row(t, t) for t in (generator.integers(3, 96, n).astype(np.int32) for n in lengths)])
