"""What is special to 4-bit storage: settings, `.to()`, sizes, bad weights."""

from __future__ import annotations

import copy

import pytest
import torch

from finetune.errors import ConfigError, ModelError
from finetune.quant.base import QUANTIZERS
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.fp4 import FP4Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config


def filled(double_quant: bool = True, dtype: torch.dtype = torch.float32) -> Codebook4Linear:
    module = QUANTIZERS.build(NF4Config(double_quant=double_quant), 32, 80, bias=True, dtype=dtype)
    module.store(torch.randn(32, 80).to(dtype))
    return module


@pytest.mark.parametrize("size", [0, 16, 48, 100, 8192, -64])
@pytest.mark.parametrize("config", [NF4Config, FP4Config])
def test_block_size_is_checked(config: type, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"quant\.block_size is {size}: expected a power of two from 32 to 4096"):
        config(block_size=size)


def test_keep_builds_nothing() -> None:
    with pytest.raises(ConfigError, match="quant=keep"):
        QUANTIZERS.build(KeepConfig(), 4, 4)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.type(torch.float16)],
    ids=["to", "half", "double", "type"],
)
def test_casting_leaves_codes_and_scales_alone(cast, double_quant: bool) -> None:  # type: ignore[no-untyped-def]
    module = filled(double_quant)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if name != "bias"}
    model = torch.nn.Sequential(module, torch.nn.Linear(32, 4))
    cast(model)
    for name, stored in before.items():
        now = module.get_parameter(name)
        assert now.dtype == stored.dtype and torch.equal(now, stored) and not now.requires_grad, name
    assert module.bias is not None and module.bias.dtype == model[1].weight.dtype == module.dtype


def test_moving_to_meta_and_back_to_empty_keeps_the_storage_dtypes() -> None:
    module = filled()
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    module.to("meta")
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    assert {name: p.dtype for name, p in module.named_parameters()} == dtypes


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (NF4Config(double_quant=False), 4.5),
        (NF4Config(), 4 + 8 / 64 + 32 / (64 * 256)),
        (NF4Config(block_size=128), 4 + 8 / 128 + 32 / (128 * 256)),
    ],
    ids=["plain", "double", "block128"],
)
def test_bits_per_weight_are_those_of_the_paper(config: NF4Config, bits: float) -> None:
    module = QUANTIZERS.build(config, 1024, 1024, device="meta")
    assert module.bits_per_weight() == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, double_quant: bool) -> None:
    w = torch.ones(32, 80)
    w[3, 3] = bad
    with pytest.raises(ModelError, match="NaN or infinity"):
        QUANTIZERS.build(NF4Config(double_quant=double_quant), 32, 80).store(w)


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[80, 32\].*\[32, 80\]"):
        filled().store(torch.randn(80, 32))


def test_an_expert_out_of_range_is_refused() -> None:
    module = QUANTIZERS.build(NF4Config(), 8, 8, experts=2)
    with pytest.raises(IndexError, match="expert 2 of 2"):
        module[2]


@pytest.mark.parametrize("transposed", [False, True], ids=["OI", "IO"])
def test_the_backward_keeps_no_dense_expert(transposed: bool) -> None:
    module = QUANTIZERS.build(NF4Config(), 64, 96, experts=3, transposed=transposed)
    module.store(torch.randn(3, 96, 64) if transposed else torch.randn(3, 64, 96))
    x = torch.randn(2, 96, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = x @ module[1] if transposed else torch.nn.functional.linear(x, module[1])
    assert kept and sum(t.numel() * t.element_size() for t in kept) < 64 * 96
    w_OI = module.dequantize(torch.float32)[1]
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w_OI.sum(1 if transposed else 0).expand(2, 96))


def test_an_expert_under_a_graph_is_a_tensor_to_everything_else() -> None:
    module = QUANTIZERS.build(NF4Config(), 64, 96, experts=3)
    module.store(torch.randn(3, 64, 96))
    dense = module.dequantize(torch.float32)[2]
    expert = module[2]
    assert not isinstance(expert, torch.Tensor)
    assert expert.shape == (64, 96) and expert.dtype == torch.float32 and torch.equal(expert.T, dense.T)
    assert torch.equal(torch.ones(64, 96) + expert, 1 + dense)
    assert torch.equal(torch.stack([expert, expert])[0], dense)
    assert torch.equal(torch.ones(2, 64) @ expert.float(), torch.ones(2, 64) @ dense)
    assert torch.equal(copy.copy(expert).dense(), dense)


def test_experts_decode_the_scales_of_one_expert_only() -> None:
    """Enough blocks that an expert starts inside a group of 256 absmax."""
    module = QUANTIZERS.build(NF4Config(block_size=32), 72, 96, experts=5)
    module.store(torch.randn(5, 72, 96))
    stack = module.dequantize(torch.float32)
    for expert in range(5):
        assert torch.equal(module[expert], stack[expert])
