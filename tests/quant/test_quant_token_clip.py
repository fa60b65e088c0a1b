"""Token-wise clipping: ranges against brute force, one range for all that read a tensor, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.errors import ConfigError
from finetune.quant.driver import Driver
from finetune.quant.recipe import Recipe
from finetune.quant.token_clip import TOKENS, best_limit
from finetune.quant.w8a8 import W4A8Config, W6A6Config, W8A8Config
from finetune.structure import inspect

STATIC: dict[str, Any] = {"activations": "tensor", "static": True}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x_NI: Tensor, w_OI: Tensor, limit: float, bits: int) -> float:
    """Of the output, in float64."""
    most = 2 ** (bits - 1) - 1
    x_NI, scale = x_NI.double(), limit / most
    rounded = (x_NI / scale).round().clamp(-most - 1, most) * scale
    return float(((rounded - x_NI) @ w_OI.double().T).square().sum())


@pytest.mark.parametrize("bits", [8, 6])
def test_a_few_large_tokens_are_cut_where_that_pays(bits: int) -> None:
    x, w = draw(500, 40), draw(16, 40, seed=1)
    x[::100, 3] = 30.0  # five of 500 tokens, in a channel that nothing reads
    w[:, 3] = 0
    largest_N = x.abs().amax(1)
    limit = float(best_limit(x, largest_N, w.T @ w, bits))
    tried = [float(largest_N.max()) * share / 200 for share in range(2, 201)]
    least = min(error(x, w, each, bits) for each in tried)
    assert limit < 6 and error(x, w, limit, bits) < error(x, w, 30.0, bits) / 20
    assert error(x, w, limit, bits) < 1.1 * least


def test_large_tokens_stay_where_they_matter() -> None:
    x, w = draw(500, 40), draw(16, 40, seed=1)
    x[::100, 3] = 30.0
    w[:, 3] *= 20
    assert float(best_limit(x, x.abs().amax(1), w.T @ w, 8)) == 30.0


def test_inputs_that_are_all_zero_or_alike() -> None:
    assert best_limit(torch.zeros(5, 4), torch.zeros(5), torch.eye(4), 8) == 0
    x = torch.full((5, 4), 2.0)
    assert best_limit(x, x.amax(1), torch.eye(4), 8) == 2.0


def model_with_outliers() -> Any:
    """A Llama in which one token of the vocabulary makes large inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.model.embed_tokens.weight.data[7] = 0
    model.model.embed_tokens.weight.data[7, 5] = 40.0  # after the norm: one channel, as large as a channel can be
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            parameter.data[:, 5] = 0  # which nothing looks at
    return model


@pytest.mark.parametrize("kind", [W8A8Config, W6A6Config, W4A8Config])
def test_the_driver_searches_one_range_for_all_readers(kind: Any) -> None:
    ids = torch.randint(8, 64, (12, 40), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = 7
    model, found = model_with_outliers(), {}
    batches = [{"input_ids": part, "use_cache": False} for part in ids.split(4)]
    for clip in ("none", "token_wise"):
        twin = copy.deepcopy(model)
        Driver(twin, inspect(twin), Recipe(kind(**STATIC, clip=clip, **_groups(kind))), batches).go()
        found[clip] = twin
    before, after = (found[clip].model.layers[0].self_attn for clip in ("none", "token_wise"))
    assert float(after.q_proj.input_scale) < 0.8 * float(before.q_proj.input_scale)
    assert torch.equal(after.q_proj.input_scale, after.v_proj.input_scale)
    with torch.no_grad():
        exact = model(input_ids=ids).logits[1:]
        errors = {clip: float((twin(input_ids=ids).logits[1:] - exact).norm()) for clip, twin in found.items()}
    assert errors["token_wise"] < errors["none"]


def _groups(kind: Any) -> dict[str, Any]:
    return {"group_size": 16} if kind is W4A8Config else {}


def test_more_tokens_than_are_looked_at() -> None:
    from finetune.quant.dense import DenseConfig
    from finetune.quant.freeze import freeze
    from finetune.quant.gram import Gram
    from finetune.quant.token_clip import clip_tokens

    model = model_with_outliers()
    structure = inspect(model)
    freeze(model, DenseConfig(), structure)
    down = next(p for p in structure.projections if p.name.endswith("down_proj"))
    x, gram = draw(TOKENS + 901, 48), Gram()
    x[17, 2] = 50.0
    gram.add(x)
    readers = model.get_submodule(down.name)
    clip_tokens(model, down, [down], gram, 6, lambda: (readers(part) for part in x.split(700)))
    assert gram.limit is not None and 2 < float(gram.limit) < 6


def test_settings_that_conflict() -> None:
    with pytest.raises(ConfigError, match="token_wise searches static scales: expected"):
        W8A8Config(clip="token_wise")
    with pytest.raises(ConfigError, match="is tokenwise: expected none or token_wise"):
        W6A6Config(**STATIC, clip="tokenwise")
