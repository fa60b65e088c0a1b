"""Llama-shaped models with random weights, quantized projection by projection as they are made.

The dense model never exists: it is described on the meta device, and each weight is drawn on the GPU, stored frozen and
let go of before the next one. Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPES = {  # hidden, intermediate, layers, heads, vocabulary
    "tiny": (64, 96, 2, 4, 128),
    "7b": (4096, 11008, 32, 32, 32000),
    "33b": (6656, 17920, 60, 52, 32000),
    "65b": (8192, 22016, 80, 64, 32000),
}
DEVIATION = 0.02
"""Standard deviation of the random weights, as Llama is initialised."""


def llama_config(size: str) -> Any:
    """transformers' configuration of one of `SHAPES`."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, vocabulary = SHAPES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def random_llama(
    size: str, quant: Any, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """A frozen model, its projections in a storage format.

    Args:
        size: of `SHAPES`.
        quant: a QuantConfig; `DenseConfig()` keeps bfloat16.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    import finetune.structure as structure
    from finetune.quant.freeze import replace_projection

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(llama_config(size)).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for projection in structure.inspect(model).projections:
        module = model.get_submodule(projection.name)
        module.weight = nn.Parameter(_drawn(module.weight, generator, device), requires_grad=False)
        replace_projection(model, quant, projection)
        del module
    _fill(model, generator, device)
    return model.to(device).eval()


def _fill(model: nn.Module, generator: torch.Generator, device: torch.device) -> None:
    """Draw what is still on meta: embeddings and head; norms are ones."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if parameter.dim() > 1:
            value = _drawn(parameter, generator, device)
        else:
            value = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _drawn(like: torch.Tensor, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    weight = torch.empty(like.shape, dtype=like.dtype, device=device)
    return weight.normal_(0, DEVIATION, generator=generator)


def adapted(model: nn.Module, rank: int, dtype: str, dropout: float = 0.0) -> list[nn.Parameter]:
    """Attach LoRA to all linear layers, as training does after what loading does; the parameters that train."""
    from finetune.adapters.attach import attach
    from finetune.adapters.lora import LoRAConfig

    torch.manual_seed(2)
    config = LoRAConfig(rank=rank, alpha=float(rank), dropout=dropout, dtype=dtype)
    return list(attach(model, config).trainable().values())


def sft_loss(model: nn.Module) -> Any:
    """`loss(ids_BS)`: the mean cross entropy as training computes it."""
    from finetune.data.rows import Batch
    from finetune.training.config import OBJECTIVES
    from finetune.training.objectives.sft import SFTConfig

    objective = OBJECTIVES.build(SFTConfig(), model)

    def loss(ids_BS: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        total, count = objective.loss_sum(Batch(ids_BS, ids_BS, positions, None))
        return total / count

    return loss


def token_ids(size: str, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Random rows that can be learnt: each counts up by a stride of its own."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[size][-1]
    start = torch.randint(0, vocabulary, (rows, 1), generator=generator)
    stride = torch.randint(1, 5, (rows, 1), generator=generator)
    return ((start + stride * torch.arange(length)) % vocabulary).to(device)
