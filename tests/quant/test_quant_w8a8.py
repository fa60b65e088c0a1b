"""w8a8, w6a6 and w4a8: the product of integers against float64, its gradient, adapters on it, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.adapters.lora_layers import LoRALinear
from finetune.errors import ConfigError, ModelError
from finetune.kernels import w8a8
from finetune.quant.base import QUANTIZERS
from finetune.quant.rounders.base import apply
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.w8a8 import IntegerExperts, IntegerLinear, W4A8Config, W6A6Config, W8A8Config
from finetune.quant.w8a8_storage import IntegerConfig

KINDS = {8: W8A8Config, 6: W6A6Config}
MOST = {8: 127, 6: 31, 4: 7}
INPUTS = [("token", False), ("tensor", False), ("tensor", True)]
CASES = [(bits, weights, *inputs) for bits in KINDS for weights in ("channel", "tensor") for inputs in INPUTS]
NAMES = [f"{bits}-{weights}-{'static' if static else inputs}" for bits, weights, inputs, static in CASES]
GROUPED = [
    W8A8Config(group_size=100),
    W6A6Config(group_size=20, activations="tensor"),
    W4A8Config(group_size=100),
    W4A8Config(group_size=50, activations="tensor", static=True),
]
NAMES += [f"{config.name}-{config.group_size}" for config in GROUPED]
case = pytest.mark.parametrize(
    "config", [KINDS[b](weights=w, activations=a, static=s) for b, w, a, s in CASES] + GROUPED, ids=NAMES
)
OUT, IN = 37, 1100
"""Odd, and wider than the columns that float32 adds up exactly at once."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config: IntegerConfig, dtype: torch.dtype = torch.float32, seen: float = 3.0, **options: Any) -> Any:
    """A module that holds a weight with rows of different sizes, its inputs having reached `seen` in calibration."""
    module = QUANTIZERS.build(config, OUT, IN, dtype=dtype, **options)
    module.see_inputs(torch.tensor(seen))
    shape = (options["experts"],) if "experts" in options else ()
    module.store((draw(*shape, OUT, IN) * torch.linspace(0.1, 2, OUT)[:, None]).to(dtype))
    if options.get("bias"):
        module.bias.data.normal_()
    return module


def rounded(x_MI: Tensor, config: IntegerConfig, seen: float = 3.0) -> Tensor:
    """What inputs are worth after rounding, in float64, by the formulas of the paper."""
    most, x_MI = MOST[config.input_bits], x_MI.detach().double()
    if config.static:
        return (x_MI * most / seen).round().clamp(-most - 1, most) * seen / most
    scale = (x_MI.abs().amax(1, keepdim=True) if config.activations == "token" else x_MI.abs().max()) / most
    return (x_MI / scale).round() * scale


@case
def test_the_product_of_integers_is_that_of_rounded_floats(config: IntegerConfig) -> None:
    module, x = filled(config, bias=True), draw(5, IN, seed=1)
    assert x.abs().max() > 3.0  # a static scale has something to clip
    w64 = module.dequantize(torch.float64)
    exact = rounded(x, config) @ w64.T + module.bias.double()
    assert (module(x).double() - exact).norm() < 1e-6 * exact.norm()
    dense = x.double() @ w64.T + module.bias.double()
    assert 1e-3 < (exact - dense).norm() / dense.norm() < (0.03 if config.input_bits == 8 else 0.1)


@case
def test_weights_have_the_codes_of_the_paper(config: IntegerConfig) -> None:
    w = draw(OUT, IN) * torch.linspace(0.1, 2, OUT)[:, None]
    module, most = filled(config), MOST[config.bits]
    size = IN if config.group_size < 0 else config.group_size
    largest = w.abs().max() if config.weights == "tensor" else w.view(OUT, -1, size).abs().amax(-1)
    assert torch.equal(module.weight_scale.view(-1), (largest / most).view(-1))
    assert module.weight_scale.shape == ((1,) if config.weights == "tensor" else (OUT, IN // size))
    scale = module.weight_scale.double()
    expected = (w.double() / (scale if config.weights == "tensor" else scale.repeat_interleave(size, 1))).round()
    assert torch.equal(module.weight.double(), expected) and module.weight.abs().max() == most
    again = module.requantize(module.dequantize(torch.float32))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(), strict=True)
    )
    moved = module.requantize(module.dequantize(torch.float32) * 0.7)
    assert config.static == ("input_scale" in moved.state_dict()) and moved.settings() == module.settings() == config
    assert module.bits_per_weight() == pytest.approx(8 + 32 / size * (config.weights == "channel"), abs=0.05)


@case
def test_the_gradient_is_straight_through(config: IntegerConfig) -> None:
    """Of a float64 model that is fed the same codes and takes the rounding for the identity."""
    module = filled(config, bias=True)
    x = draw(6, IN, seed=2).requires_grad_()
    module(x).square().sum().backward()
    x64 = x.detach().double().requires_grad_()
    y64 = (x64 + (rounded(x64, config) - x64).detach()) @ module.dequantize(torch.float64).T + module.bias.double()
    y64.square().sum().backward()
    assert x.grad is not None and x64.grad is not None
    assert (x.grad.double() - x64.grad).norm() < 1e-5 * x64.grad.norm()


@case
def test_adapters_multiply_by_it_as_it_does_itself(config: IntegerConfig) -> None:
    """Zero-initialized, a LoRA changes no bit; trained, its gradients are those of float64 on the same codes."""
    module, x = filled(config), draw(6, IN, seed=3)
    adapted = LoRALinear(module, rank=4, scaling=2.0, dropout=0.0)
    assert torch.equal(adapted(x), module(x))
    for factor in adapted.parameters():
        if factor.requires_grad:
            factor.data = draw(*factor.shape, seed=4) / 10
    leaf = x.clone().requires_grad_()
    adapted(leaf).square().sum().backward()
    factors = [p for p in adapted.parameters() if p.requires_grad]
    a64, b64 = (p.detach().double().requires_grad_() for p in factors)
    x64 = x.double().requires_grad_()
    base = (x64 + (rounded(x64, config) - x64).detach()) @ module.dequantize(torch.float64).T
    (base + 2.0 * x64 @ a64.T @ b64.T).square().sum().backward()
    for mine, exact in [(leaf, x64), (factors[0], a64), (factors[1], b64)]:
        assert mine.grad is not None and exact.grad is not None
        assert (mine.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@case
def test_half_precision(config: IntegerConfig, dtype: torch.dtype) -> None:
    module, x = filled(config, dtype), draw(5, IN, seed=1).to(dtype)
    y = module(x)
    seen = float(module.input_scale) * MOST[config.input_bits] if config.static else 3.0
    exact = rounded(x, config, seen) @ module.dequantize(torch.float64).T
    assert y.dtype == dtype and (y.double() - exact).norm() < 5e-3 * exact.norm()
    held = module.weight_scale.to(dtype).float()
    assert torch.equal(held, module.weight_scale)  # whoever keeps scales in the model's dtype loses nothing


def test_rounding_twice_is_rounding_once_and_tokens_fare_better_than_tensors() -> None:
    x = draw(16, 200) * torch.linspace(0.2, 4, 16)[:, None]
    errors = {}
    for per_token in (True, False):
        scale = w8a8.input_scale(x, 8, per_token, None)
        once = w8a8.decode(w8a8.round_to(x, scale, -127, 127), scale)
        again = w8a8.input_scale(once, 8, per_token, None)
        torch.testing.assert_close(w8a8.decode(w8a8.round_to(once, again, -127, 127), again), once, rtol=3e-7, atol=0)
        errors[per_token] = (once - x).norm(dim=1)
    assert bool((errors[True] <= errors[False] * 1.02).all()) and errors[True].sum() < 0.7 * errors[False].sum()


@pytest.mark.parametrize(("activations", "static"), INPUTS)
def test_rows_of_zeros_empty_calls_and_what_is_not_finite(activations: str, static: bool) -> None:
    module = filled(W8A8Config(activations=activations, static=static), bias=True)
    x = draw(4, IN)
    x[1] = 0
    torch.testing.assert_close(module(x)[1], module.bias)
    assert module(x[:0]).shape == (0, OUT) and module(draw(2, 0, IN)).shape == (2, 0, OUT)
    x[2, 5] = float("nan")
    y = module(x)
    assert y[2].isnan().all() and ((activations == "tensor" and not static) or y[[0, 1, 3]].isfinite().all())


def test_inputs_are_left_as_they_are() -> None:
    module, x = filled(W8A8Config()), draw(3, IN)
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("activations", "static"), INPUTS)
def test_operators(activations: str, static: bool) -> None:
    module = filled(W8A8Config(activations=activations, static=static))
    fixed = module.input_scale if static else None
    x = draw(3, IN, seed=5).requires_grad_()
    arguments = (x, draw(OUT), module.weight, module.weight_scale, fixed, 8, activations == "token")
    torch.library.opcheck(torch.ops.finetune.integer_linear_w8a8.default, arguments)
    storage = (module.weight.detach(), module.weight_scale.detach())
    torch.library.opcheck(torch.ops.finetune.dequantize_w8a8.default, (*storage, [OUT, IN], torch.bfloat16))
    torch.library.opcheck(torch.ops.finetune.linear_w8a8.default, (x, None, *storage, OUT))
    torch.library.opcheck(torch.ops.finetune.input_gradient_w8a8.default, (draw(3, OUT), *storage, IN))
    codes = torch.randint(-128, 128, (5, IN), dtype=torch.int8)
    torch.library.opcheck(torch.ops.finetune.int8_product.default, (codes, storage[0]))
    grouped = filled(W4A8Config(group_size=20))
    storage = (grouped.weight.detach(), grouped.weight_scale.detach())
    torch.library.opcheck(torch.ops.finetune.integer_linear_w8a8.default, (x, None, *storage, None, 8, True))
    torch.library.opcheck(torch.ops.finetune.dequantize_w8a8.default, (*storage, [OUT, IN], torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_are_exact_down_to_the_lowest_code(rows: int) -> None:
    x, w = torch.full((rows, 4000), -128, dtype=torch.int8), torch.full((9, 4000), 127, dtype=torch.int8)
    assert (torch.ops.finetune.int8_product(x, w) == -128 * 127 * 4000).all()


def test_experts_round_no_inputs() -> None:
    for config in (W8A8Config(), W8A8Config(weights="tensor", activations="tensor", static=True)):
        module = filled(config, experts=3)
        assert isinstance(module, IntegerExperts) and "input_scale" not in module.state_dict()
        x = draw(5, IN)
        exact = x @ module.dequantize(torch.float32)[1].T
        torch.testing.assert_close(torch.nn.functional.linear(x, module[1]), exact, rtol=1e-4, atol=1e-4)
    assert module.weight_scale.shape == (3, 1, 1)


@pytest.mark.parametrize("settings", [{}, {"weights": "tensor"}, {"group_size": 16}], ids=lambda s: "-".join(s))
def test_gptq_chooses_codes_on_the_same_scales(settings: dict[str, Any]) -> None:
    mix = draw(64, 64, seed=6) + 2 * draw(64, 1, seed=7) @ draw(1, 64, seed=8)
    x, w = draw(512, 64, seed=9) @ mix, draw(24, 64, seed=10)
    modules = [QUANTIZERS.build(W6A6Config(**settings), 24, 64) for _ in range(3)]
    modules[0].store(w)
    result = apply(GPTQ(), modules[1], w, [x.T @ x])
    assert result.error < result.error_rtn / 1.5
    assert torch.equal(modules[1].weight_scale, modules[0].weight_scale)
    apply(GPTQ(), modules[2], w, [torch.eye(64)])
    assert torch.equal(modules[2].weight, modules[0].weight)


def test_rows_are_uncoupled_while_that_is_asked() -> None:
    module, x = filled(W8A8Config(activations="tensor")), draw(2, IN)
    x[1] *= 50
    with module.uncoupled():
        torch.testing.assert_close(module(x)[:1], module(x[:1]), rtol=1e-5, atol=1e-5)
    assert module.inputs == "tensor"
    assert (module(x)[:1] - module(x[:1])).norm() > 0.05 * module(x[:1]).norm()


def test_scales_that_half_precision_cannot_hold_stay_exact() -> None:
    module = QUANTIZERS.build(W8A8Config(), 2, 40, dtype=torch.float16)
    w = draw(2, 40) * torch.tensor([[1.0], [1e-6]])
    module.store(w)
    assert ((module.dequantize(torch.float32) - w).norm(dim=1) < 0.01 * w.norm(dim=1)).all()


REFUSED = [
    ({"weights": "row"}, "quant.weights is row: expected channel or tensor"),
    ({"activations": "channel"}, "quant.activations is channel: expected token or tensor"),
    ({"static": True}, "quant.static=true fixes one scale for all tokens: expected quant.activations=tensor"),
    ({"group_size": 0}, "quant.group_size is 0: expected 2 or more, or -1 for whole rows"),
    ({"group_size": 64, "weights": "tensor"}, "expected quant.weights=channel, or group_size=-1"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        W8A8Config(**settings)


def test_groups_divide_the_inputs_of_a_layer_or_hold_all_of_them() -> None:
    words = "quant.group_size=64 does not divide the 1100 inputs of a layer: expected 4, or -1 for whole rows"
    with pytest.raises(ConfigError, match=words):
        QUANTIZERS.build(W4A8Config(), OUT, IN, device="meta")
    with pytest.raises(ConfigError, match="expected -1 for whole rows"):
        QUANTIZERS.build(W8A8Config(group_size=3), OUT, IN, experts=2)
    assert QUANTIZERS.build(W4A8Config(), OUT, 40).weight_scale.shape == (OUT, 1)


def test_finer_groups_err_less() -> None:
    w = draw(OUT, 128, seed=11) * torch.linspace(0.2, 3, 128)
    errors = []
    for size in (-1, 64, 32, 16):
        module = QUANTIZERS.build(W4A8Config(group_size=size), OUT, 128)
        module.store(w)
        errors.append(float((module.dequantize(torch.float32) - w).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_static_scales_that_are_missing_are_named() -> None:
    module = QUANTIZERS.build(W8A8Config(activations="tensor", static=True), OUT, IN)
    module.store(draw(OUT, IN))
    for use in (lambda: module(draw(2, IN)), module.operand):
        with pytest.raises(ModelError, match=r"no scale for inputs: quantize with data\.calibration first"):
            use()
    with pytest.raises(ModelError, match=f"a layer of {IN} inputs saw none in calibration"):
        module.see_inputs(None)
    module.see_inputs(torch.tensor(0.0))
    assert float(module.input_scale) > 0 and module(torch.zeros(1, IN)).eq(0).all()


def test_corrupt_states_are_named() -> None:
    static = W8A8Config(activations="tensor", static=True)
    module: IntegerLinear = filled(static)
    for change, words in [
        ({"weight": module.weight.float()}, "weight is .*float32, expected .*int8"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale is \[3\] torch.float32, expected \[37, 1\]"),
        ({"input_scale": torch.ones(2)}, r"input_scale is \[2\] torch.float32, expected \[1\]"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            filled(static).load_state_dict(module.state_dict() | change)
    state = {key: value for key, value in module.state_dict().items() if key != "input_scale"}
    with pytest.raises(RuntimeError, match="input_scale is missing"):
        filled(static).load_state_dict(state)
    with pytest.raises(RuntimeError, match="input_scale is in the checkpoint, but the settings say token"):
        filled(W8A8Config()).load_state_dict(module.state_dict())


def test_what_is_not_finite_is_refused() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = draw(OUT, IN)
        w[2, 3] = bad
        for weights in ("channel", "tensor"):
            with pytest.raises(ModelError, match="holds NaN or infinity"):
                QUANTIZERS.build(W8A8Config(weights=weights), OUT, IN).store(w)
