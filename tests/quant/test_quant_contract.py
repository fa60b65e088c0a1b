"""What every storage format must honour, over the whole registry: a new format is tested as soon as it registers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear, QuantConfig

FORMATS = [name for name in QUANTIZERS.types() if name != "keep"]
OUT, IN, EXPERTS = 24, 40, 3
ERROR = {"int2": 0.6, "int3": 0.25}
"""Relative error of a Gaussian weight that a format may leave; 0.2 where it is not named."""
ROUNDS_ITS_INPUT = {"int8": 0.02, "w8a8": 0.02, "w6a6": 0.06, "w4a8": 0.02}
"""Relative error of a product that rounding the input may add: these formats do so by definition."""


def linear(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[FrozenLinear, Tensor]:
    """A filled module and the dense weight it was filled with."""
    module = QUANTIZERS.build(QUANTIZERS.type_of(name)(), OUT, IN, bias=bias, dtype=dtype)
    w_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.store(w_OI)
    if bias:
        module.bias.data.normal_()
    return module, w_OI


def experts(name: str, transposed: bool = False, in_features: int = IN) -> tuple[FrozenExperts, Tensor]:
    """A filled stack and the dense parameter it was filled with."""
    config = QUANTIZERS.type_of(name)()
    module = QUANTIZERS.build(config, OUT, in_features, experts=EXPERTS, transposed=transposed)
    shape = (in_features, OUT) if transposed else (OUT, in_features)
    w = torch.randn(EXPERTS, *shape, generator=torch.Generator().manual_seed(0))
    module.store(w)
    return module, w


@pytest.mark.parametrize("name", FORMATS)
def test_forward_multiplies_by_what_it_decodes(name: str) -> None:
    module, w_OI = linear(name)
    x = torch.randn(2, 5, IN)
    decoded = module.dequantize(torch.float32)
    assert decoded.shape == w_OI.shape
    assert (decoded - w_OI).norm() < ERROR.get(name, 0.2) * w_OI.norm()
    exact = x @ decoded.T + module.bias
    if name in ROUNDS_ITS_INPUT:
        assert 0 < (module(x) - exact).norm() < ROUNDS_ITS_INPUT[name] * exact.norm()
    else:
        torch.testing.assert_close(module(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_speaks_the_dtype_of_its_input(name: str, dtype: torch.dtype) -> None:
    module, _ = linear(name)
    y = module(torch.randn(3, IN, dtype=dtype))
    assert y.dtype == dtype and module.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("name", FORMATS)
def test_autocast_acts_as_on_a_dense_layer(name: str) -> None:
    module, _ = linear(name)
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
def test_gradient_flows_to_the_input_only_and_survives_an_evaluation_pass(name: str) -> None:
    module, _ = linear(name)
    x = torch.randn(4, IN)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        module.train()
        module(leaf).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        module.eval()(x)
    assert torch.equal(before, gradient())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    w64 = module.dequantize(torch.float32).double()
    with torch.no_grad():
        exact = 2 * module(x).double() @ w64  # straight through whatever the format does to its input
    assert (before.double() - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_requantizing_the_stored_weight_keeps_every_bit(name: str) -> None:
    module, _ = linear(name)
    same = module.requantize(module.dequantize(torch.float32))
    assert type(same) is type(module)
    ours, theirs = module.state_dict(), same.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    moved = module.requantize(module.dequantize(torch.float32) * 1.5)
    assert not torch.equal(moved.dequantize(torch.float32), module.dequantize(torch.float32))
    assert torch.equal(moved.bias, module.bias) and moved.bias is not module.bias


@pytest.mark.parametrize("name", FORMATS)
def test_state_round_trips_through_safetensors(name: str) -> None:
    module, _ = linear(name, torch.bfloat16)
    state = load(save(module.state_dict()))
    for device in ("cpu", "meta"):
        empty = QUANTIZERS.build(QUANTIZERS.type_of(name)(), OUT, IN, bias=True, dtype=torch.bfloat16, device=device)
        empty.load_state_dict(state, strict=True, assign=True)
        x = torch.randn(2, IN, dtype=torch.bfloat16)
        assert torch.equal(empty(x), module(x))
        assert all(not p.requires_grad for p in empty.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_loading_names_what_is_missing_or_unexpected(name: str) -> None:
    module, _ = linear(name)
    state = dict(module.state_dict())
    state["stranger"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="stranger"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight"):
        module.load_state_dict({"bias": module.bias})
    with pytest.raises(RuntimeError, match="bias"):
        module.load_state_dict({k: v for k, v in module.state_dict().items() if k != "bias"})


@pytest.mark.parametrize("name", FORMATS)
def test_storage_is_parameters_without_gradient(name: str) -> None:
    for module in (linear(name)[0], experts(name)[0]):
        assert not list(module.buffers())
        assert all(not p.requires_grad and type(p) is torch.nn.Parameter for p in module.parameters())
        stored = sum(p.numel() * p.element_size() for n, p in module.named_parameters() if n != "bias")
        weights = OUT * IN * (EXPERTS if isinstance(module, FrozenExperts) else 1)
        assert module.bits_per_weight() == pytest.approx(8 * stored / weights)
        assert module.bytes() == sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_copies_are_independent(name: str) -> None:
    module, w_OI = linear(name)
    twin = copy.deepcopy(module)
    twin.store(w_OI * 2)
    assert not torch.equal(twin.dequantize(torch.float32), module.dequantize(torch.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_meta_modules_cost_nothing_and_fill_where_the_weight_is(name: str) -> None:
    config = QUANTIZERS.type_of(name)()
    empty = QUANTIZERS.build(config, OUT, IN, bias=False, dtype=torch.float32, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    module, w_OI = linear(name, bias=False)
    empty.store(w_OI)
    assert torch.equal(empty.dequantize(torch.float32), module.dequantize(torch.float32))


@pytest.mark.parametrize("in_features", [IN, 64, 33], ids=lambda n: f"in{n}")
@pytest.mark.parametrize("transposed", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_expert_is_a_slice_of_the_stack(name: str, transposed: bool, in_features: int) -> None:
    """With 33 inputs an expert is 792 weights: neither whole blocks nor, in general, an even start."""
    module, w = experts(name, transposed, in_features)
    stack = module.dequantize(torch.float32)
    assert stack.shape == w.shape
    assert (stack - w).norm() < ERROR.get(name, 0.2) * w.norm()
    for expert in range(EXPERTS):
        assert torch.equal(module[expert], stack[expert])
        assert torch.equal(module[torch.tensor(expert)], stack[expert])


@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_carries_the_gradient_of_its_input(name: str) -> None:
    module, _ = experts(name)
    x = torch.randn(4, IN, requires_grad=True)
    torch.nn.functional.linear(x, module[1]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.dequantize(torch.float32)[1].sum(0).expand(4, IN))


@pytest.mark.parametrize("in_features", [IN, 64, 33], ids=lambda n: f"in{n}")
@pytest.mark.parametrize("transposed", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_multiplies_alike_with_and_without_a_graph(name: str, transposed: bool, in_features: int) -> None:
    module, _ = experts(name, transposed, in_features)
    x, b = torch.randn(4, in_features), torch.randn(OUT)

    def products(x: Tensor) -> list[Tensor]:
        if transposed:
            return [x @ module[1], torch.matmul(x, module[1]) + b]
        return [torch.nn.functional.linear(x, module[1]), torch.nn.functional.linear(x, module[1], b)]

    with torch.no_grad():
        quiet = products(x)
    recorded = products(x.clone().requires_grad_())
    assert all(r.requires_grad and torch.equal(r, q) for r, q in zip(recorded, quiet, strict=True))


@pytest.mark.parametrize("transposed", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_requantize_and_round_trip(name: str, transposed: bool) -> None:
    module, _ = experts(name, transposed)
    same = module.requantize(module.dequantize(torch.float32))
    ours, theirs = module.state_dict(), same.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    empty = QUANTIZERS.build(QUANTIZERS.type_of(name)(), OUT, IN, experts=EXPERTS, transposed=transposed, device="meta")
    empty.load_state_dict(load(save(ours)), strict=True)
    assert torch.equal(empty[2], module[2])


@pytest.mark.parametrize("name", FORMATS)
def test_experts_follow_the_dtype_of_their_model(name: str) -> None:
    module, _ = experts(name)
    assert module[0].dtype == torch.float32
    assert module.to(torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", QUANTIZERS.types())
def test_configs_hold_plain_values(name: str) -> None:
    config = QUANTIZERS.type_of(name)()
    assert isinstance(config, QuantConfig) and config.name == name
    assert type(config)(**dataclasses.asdict(config)) == config
    assert all(isinstance(value, (str, int, float, bool)) for value in dataclasses.asdict(config).values())
