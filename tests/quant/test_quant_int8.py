"""Row-wise int8 modules against bitsandbytes' own layer, whole models, and what is refused."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from finetune.adapters.lora_layers import LoRALinear
from finetune.data.rows import Row, TokenRows
from finetune.errors import ConfigError, ModelError
from finetune.quant.base import QUANTIZERS
from finetune.quant.freeze import freeze
from finetune.quant.int8 import Int8Experts, Int8Linear
from finetune.quant.int8_storage import Int8Config
from finetune.structure.inspect import inspect
from finetune.training.separation import needs_mask


def filled(config: Int8Config, out_features: int = 48, in_features: int = 128, **options: Any) -> Any:
    module = QUANTIZERS.build(config, out_features, in_features, **options)
    shape = (options["experts"],) if "experts" in options else ()
    module.store(torch.randn(*shape, out_features, in_features, generator=torch.Generator().manual_seed(0)) / 10)
    return module


def theirs(module: Int8Linear, weight: torch.Tensor) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(128, 48, bias=True, has_fp16_weights=False, threshold=module.threshold)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(module.bias.detach().clone().half(), requires_grad=False)
    return layer.to("cpu")


def test_it_is_the_layer_of_bitsandbytes() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) / 10
    module = filled(Int8Config(threshold=6.0), bias=True, dtype=torch.float16)
    module.bias.data.normal_()
    layer = theirs(module, weight)
    state, other = module.state_dict(), layer.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    x = torch.randn(33, 128)
    x[:, :3] *= 10
    x = x.half()
    y, expected = module(x).float(), layer.eval()(x.clone()).float()  # in training theirs rounds no inputs on a CPU
    assert (y - expected).norm() < 2e-3 * expected.norm()
    again = QUANTIZERS.build(Int8Config(), 48, 128, bias=True, dtype=torch.float16, device="meta")
    again.load_state_dict(other, assign=True)
    assert torch.equal(again(x), module(x))


def test_the_gradient_is_that_of_bitsandbytes() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) / 10
    module = filled(Int8Config(), bias=True, dtype=torch.float16)
    layer = theirs(module, weight)
    x, grad = torch.randn(9, 128).half(), torch.randn(9, 48).half()
    found = []
    for one in (module, layer):
        leaf = x.clone().requires_grad_()
        one(leaf).backward(grad)
        found.append(leaf.grad.float())
    assert (found[0] - found[1]).norm() < 2e-3 * found[1].norm()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_adapters_multiply_by_it_as_it_does_itself(threshold: float) -> None:
    """A LoRA whose product is zero changes no bit, so the threshold reaches the operator that fuses both."""
    module = filled(Int8Config(threshold=threshold))
    x = torch.randn(5, 128)
    x[:, 3] *= 20
    adapted = LoRALinear(module, rank=4, scaling=1.0, dropout=0.0)
    torch.testing.assert_close(adapted(x), module(x), rtol=1e-6, atol=1e-6)
    exact = x @ module.dequantize(torch.float32).T
    error = (module(x) - exact).norm() / exact.norm()
    assert error < 1e-6 if threshold == 0 else 1e-4 < error < 2e-2


def test_experts_round_no_inputs() -> None:
    module = filled(Int8Config(), experts=2)
    assert isinstance(module, Int8Experts)
    x = torch.randn(5, 128)
    exact = x @ module.dequantize(torch.float32)[1].T
    torch.testing.assert_close(torch.nn.functional.linear(x, module[1]), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_one_line(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"^quant.threshold is .*: expected 0 .weight-only. or a magnitude above it$"):
        Int8Config(threshold=threshold)


def test_corrupt_states_are_named() -> None:
    module = filled(Int8Config())
    for change, message in [
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2: expected 0"),
        ({"SCB": torch.ones(3)}, r"SCB is \[3\] torch.float32, expected \[48\]"),
        ({"weight": module.weight.float()}, "weight is .*float32, expected .*int8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            filled(Int8Config()).load_state_dict(module.state_dict() | change)
    with pytest.raises(RuntimeError, match="SCB is missing"):
        filled(Int8Config()).load_state_dict({"weight": module.weight})


def test_what_is_not_finite_is_refused() -> None:
    for bad in (float("nan"), float("inf"), 1e6):  # the last is none in float16, where bitsandbytes rounds
        w = torch.randn(48, 128)
        w[2, 3] = bad
        with pytest.raises(ModelError, match="holds NaN or infinity"):
            QUANTIZERS.build(Int8Config(), 48, 128).store(w)


def test_it_says_its_size_and_settings() -> None:
    module = filled(Int8Config(threshold=4.0))
    assert module.bits_per_weight() == 8 + 32 / 128 and module.storage == "int8"
    assert module.requantize(torch.randn(48, 128)).threshold == 4.0
    assert module.to(torch.bfloat16).SCB.dtype == torch.float32 and "threshold=4" in repr(module)


def test_outliers_that_rows_share_are_no_leak_of_the_model() -> None:
    """Whether packed rows stay apart is asked of its attention; the threshold is back afterwards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    freeze(model, Int8Config(threshold=2.5), inspect(model))
    ids = np.arange(3, 23, dtype=np.int32)
    rows = TokenRows.of([Row(ids, ids)])
    assert not needs_mask(model, rows, 0, torch.device("cpu"))
    thresholds = {module.threshold for module in model.modules() if isinstance(module, Int8Linear)}
    assert thresholds == {2.5}
