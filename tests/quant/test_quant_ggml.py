"""llama.cpp's blocks: byte for byte what the gguf package writes, and rounders that work on them.

`ggml_v1.safetensors` holds a weight, what gguf 0.19.0 made of it (`blocks`, `decoded`), and states as this program
saved them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_matrices import normal
from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import ConfigError, ModelError
from finetune.kernels import ggml
from finetune.kernels.operand_linear import operand_linear
from finetune.quant.base import QUANTIZERS
from finetune.quant.facts import pack_json, unpack_json
from finetune.quant.ggml import Q4_0Config
from finetune.quant.ggml_grid import GgmlGrid
from finetune.quant.ggml_storage import FACTS
from finetune.quant.rounders.base import Rounder, apply
from finetune.quant.rounders.gptq import GPTQ, GPTQConfig
from finetune.quant.rounders.obq import OBQ

KINDS = list(ggml.LAYOUTS)
BITS = {"q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5}
SAMPLE = Path(__file__).parent / "ggml_v1.safetensors"


def empty(kind: str, *shape: int, outliers: int = 0, **options: Any) -> Any:
    experts = {"experts": shape[0]} if len(shape) == 3 else {}
    config: Any = QUANTIZERS.type_of(kind)
    return QUANTIZERS.build(config(outliers=outliers), *shape[-2:], **experts, **options)


def blocks(w_OI: Tensor, kind: str) -> Tensor:
    module = empty(kind, *w_OI.shape)
    module.store(w_OI)
    return module.weight.detach()


def decoded(held: Tensor, kind: str, shape: Sequence[int]) -> Tensor:
    return ggml.dequantize_ggml(held, None, None, kind, list(shape), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_committed_vectors(kind: str) -> None:
    sample = load_file(SAMPLE)
    w_OI = sample["w"]
    held = blocks(w_OI, kind)
    assert torch.equal(held, sample[f"{kind}.blocks"])
    assert torch.equal(
        ggml.dequantize_ggml(held, None, None, kind, list(w_OI.shape), torch.float32), sample[f"{kind}.decoded"]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e-6, 3e3], ids=str)
def test_bytes_are_those_of_the_gguf_package(kind: str, size: float) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    numpy, of = pytest.importorskip("numpy"), gguf.GGMLQuantizationType[kind.upper()]
    for number, make in enumerate(
        (lambda w: w, lambda w: w.bfloat16().float(), lambda w: w.round(), lambda w: w.abs())
    ):
        w_OI = make(normal(200, 320, seed=number)) * size
        with numpy.errstate(divide="ignore", invalid="ignore"):
            theirs = gguf.quants.quantize(w_OI.numpy(), of)
        assert torch.equal(blocks(w_OI, kind), torch.from_numpy(theirs))
        decoded = torch.from_numpy(gguf.quants.dequantize(theirs, of))
        assert torch.equal(
            ggml.dequantize_ggml(blocks(w_OI, kind), None, None, kind, [200, 320], torch.float32), decoded
        )


@given(
    st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 100), st.floats(-3, 3), st.sampled_from([1e-3, 1.0, 1e4])
)
@settings(max_examples=100, deadline=None)
def test_packing_is_undone_and_no_weight_is_further_than_its_step(
    kind: str, rows: int, width: int, shift: float, size: float
) -> None:
    w_OI = (torch.randn(rows, width) + shift) * size
    grid = GgmlGrid.fit(w_OI, kind)
    codes = grid.round_columns(w_OI, 0)
    held = grid.pack(codes)
    assert held.shape == (rows, -(-width // 32) * ggml.LAYOUTS[kind].size) and held.dtype == torch.uint8
    found, scale, least = ggml.unpack(held, kind, width)
    assert torch.equal(found, codes) and torch.equal(scale, grid.scale_OG)
    assert (least is None) == (grid.least_OG is None) and (least is None or torch.equal(least, grid.least_OG))
    step = ggml.spread(grid.scale_OG, 0, width).float().abs()
    # Half a step; a whole one at the end that q4_0 and q5_0 lack; and what float16 takes off d and m.
    half = 1.0 if kind in ("q4_0", "q5_0") else 0.5
    bits = ggml.LAYOUTS[kind].bits
    slack = (half + 2 ** (bits - 11)) * step * 1.01 + 2**-10 * w_OI.abs() + 2 ** (bits - 24)
    if least is not None:
        slack = slack + 2**-11 * ggml.spread(least, 0, width).float().abs()
    assert ((grid.decode(codes) - w_OI).abs() <= slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_weight_and_short_rows(kind: str) -> None:
    assert empty(kind, 4, 64).bits_per_weight() == BITS[kind]
    w_OI = normal(3, 40)
    whole, short = empty(kind, 3, 32), empty(kind, 3, 40)
    whole.store(w_OI[:, :32])
    short.store(w_OI)
    assert torch.equal(short.dequantize(torch.float32)[:, :32], whole.dequantize(torch.float32))
    alone = empty(kind, 3, 8)  # the rest is a block of its own, which what fills it up does not change
    alone.store(w_OI[:, 32:])
    assert torch.equal(short.dequantize(torch.float32)[:, 32:], alone.dequantize(torch.float32))


@pytest.mark.parametrize("shape", [(24, 64), (7, 40), (2, 5, 33)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_storing_is_fitting_rounding_and_taking(kind: str, shape: tuple[int, ...]) -> None:
    module, other, w = empty(kind, *shape), empty(kind, *shape), normal(*shape)
    module.store(w)
    grid = other.fit(w)
    codes = grid.round_columns(w, 0)
    other.take(grid, codes)
    assert torch.equal(module.weight, other.weight)
    decoded = module.decode(torch.float32)
    assert torch.equal(grid.decode(codes), decoded)
    if len(shape) == 3:
        grid, w, codes, decoded = grid.expert(1), w[1], codes[1], decoded[1]
    for cut in (slice(0, 2), slice(31, 33), slice(32, 33)):
        assert torch.equal(grid.round_columns(w[:, cut], cut.start), codes[:, cut])
        assert torch.equal(grid.decode(codes[:, cut], cut.start), decoded[:, cut])
    part = grid.part(slice(2, 5))
    assert torch.equal(part.round_columns(w[2:5], 0), codes[2:5]) and torch.equal(part.decode(codes[2:5]), decoded[2:5])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_beyond_the_block_take_its_ends(kind: str) -> None:
    """What rounders ask once they have moved a weight."""
    grid = GgmlGrid.fit(torch.cat([normal(2, 32), torch.zeros(2, 32), normal(2, 32) * 1e-12], dim=1), kind)
    ends = [grid.decode(grid.round_columns(torch.full((2, 96), far), 0)) for far in (-1e30, 1e30)]
    values = torch.stack([grid.decode(torch.full((2, 96), code, dtype=torch.uint8)) for code in _codes(kind)])
    assert torch.equal(ends[0], values.amin(dim=0)) and torch.equal(ends[1], values.amax(dim=0))


def _codes(kind: str) -> range:
    """Those that rounding gives: q8_0 leaves -128 out."""
    count = 2 ** ggml.LAYOUTS[kind].bits
    return range(1 if count == 256 else 0, count)


@pytest.mark.parametrize("rounder", [GPTQ(), GPTQ(GPTQConfig(act_order=False)), OBQ()], ids=["act", "order", "obq"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounders_work_on_blocks(kind: str, rounder: Rounder) -> None:
    w_OI = normal(12, 64)
    x_NI = normal(256, 64, seed=2) @ (torch.eye(64) + 0.5 * normal(64, 64, seed=3) / 8)
    module, nearest = empty(kind, 12, 64), empty(kind, 12, 64)
    nearest.store(w_OI)
    grid = nearest.fit(w_OI)
    choice = rounder.choose(grid, w_OI, torch.eye(64))
    assert choice is not None and torch.equal(choice.codes_OI, grid.round_columns(w_OI, 0))
    result = apply(rounder, module, w_OI, [x_NI.T @ x_NI])
    assert result.error < 0.9 * result.error_rtn

    def scales(held: Tensor) -> Tensor:
        return ggml.unpack(held, kind, 64)[1]

    assert torch.equal(scales(module.weight), scales(nearest.weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outliers", [0, 2])
def test_operators_are_sound(kind: str, outliers: int) -> None:
    module = empty(kind, 6, 40, outliers=outliers)
    module.store(normal(6, 40))
    held, operators = module.packed(), torch.ops.finetune
    x, bias = normal(3, 40).requires_grad_(), normal(6).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.dequantize_ggml, (*held, kind, [6, 40], torch.float32), test_utils=checks)
    torch.library.opcheck(operators.linear_ggml, (x, bias, *held, kind, 6), test_utils=checks)
    torch.library.opcheck(operators.input_gradient_ggml, (normal(3, 6), *held, kind, 40), test_utils=checks)
    w64 = module.dequantize(torch.float64)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double()
    assert torch.autograd.gradcheck(lambda x: ggml.linear_ggml(x, bias64, *held, kind, 6), (x64,))
    torch.testing.assert_close(ggml.linear_ggml(x64, bias64, *held, kind, 6), x64 @ w64.T + bias64)


@pytest.mark.parametrize("shape", [(5, 64), (3, 40), (2, 3, 33)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outliers_are_kept_aside_exactly_and_make_no_block_worse(kind: str, shape: tuple[int, ...]) -> None:
    w = normal(*shape) ** 5  # heavy tails
    errors = []
    for outliers in (0, 1, 3):
        module, other = empty(kind, *shape, outliers=outliers), empty(kind, *shape, outliers=outliers)
        module.store(w)
        dense = module.dequantize(torch.float32)
        errors.append((dense - w).square().flatten(0, -2)[:, :32].sum(dim=1))
        grid = other.fit(w)
        other.take(grid, grid.round_columns(w, 0))
        assert torch.equal(other.dequantize(torch.float32), dense)
        assert torch.equal(grid.decode(grid.round_columns(w[..., 1:33], 1), 1), dense[..., 1:33])
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        first, rows = dense.flatten(0, -2)[:, :32], w.flatten(0, -2)[:, :32]
        furthest = rows.abs().topk(outliers, dim=1).indices
        assert torch.equal(first.gather(1, furthest), rows.gather(1, furthest).half().float())
        bits = 8 * sum(p.numel() * p.element_size() for p in module.parameters()) / w.numel()
        assert module.bits_per_weight() == pytest.approx(bits)
    # A weight that is kept aside is off by 2^-11 of itself at most, as one at the end of the block may be not at all.
    slack = 2 * (2**-11 * w.flatten(0, -2)[:, :32]).square().sum(dim=1)
    assert (errors[1] <= errors[0] + slack).all() and (errors[2] <= errors[0] + slack).all()
    assert errors[2].sum() < 0.6 * errors[0].sum()


@pytest.mark.parametrize("rounder", [GPTQ(), OBQ()], ids=["gptq", "obq"])
def test_outliers_stay_as_they_are_when_codes_are_calibrated(rounder: Rounder) -> None:
    w_OI, x_NI = normal(12, 64) ** 3, normal(256, 64, seed=2) @ (torch.eye(64) + normal(64, 64, seed=3) / 16)
    module, nearest = empty("q4_0", 12, 64, outliers=2), empty("q4_0", 12, 64, outliers=2)
    nearest.store(w_OI)
    result = apply(rounder, module, w_OI, [x_NI.T @ x_NI])
    assert result.error < 0.9 * result.error_rtn
    assert torch.equal(module.places, nearest.places) and torch.equal(module.values, nearest.values)
    wanted = (x_NI @ (w_OI - module.dequantize(torch.float32)).T).square().sum() / (x_NI @ w_OI.T).square().sum()
    assert float(wanted) == pytest.approx(result.error, rel=1e-3)


@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 33)], ids=str)
def test_outliers_are_saved_and_used(shape: tuple[int, ...]) -> None:
    module = empty("q4_0", *shape, outliers=2)
    module.store(normal(*shape))
    state = dict(module.state_dict())
    assert {"weight", "weight.places", "weight.values", FACTS} == set(state)
    for device in ("cpu", "meta"):
        again = empty("q5_0", *shape, device=device)  # takes over what the state says
        again.load_state_dict(state, assign=True)
        assert again.settings() == module.settings() and again.settings().outliers == 2
        assert torch.equal(again.dequantize(torch.float32), module.dequantize(torch.float32))
    x, w = normal(4, shape[-1]), module.dequantize(torch.float32)
    one, dense = (module[1], w[1]) if len(shape) == 3 else (None, w)
    y = module(x) if one is None else torch.nn.functional.linear(x, one)
    torch.testing.assert_close(y, x @ dense.T)
    same = module.requantize(w)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), same.parameters(), strict=True))
    state["weight.places"] = state["weight.places"] + 32
    with pytest.raises(RuntimeError, match=r"weight\.places names a weight beyond its block"):
        empty("q4_0", *shape).load_state_dict(state)
    del state["weight.values"]
    with pytest.raises(RuntimeError, match=r"weight\.values is missing"):
        empty("q4_0", *shape).load_state_dict(state | {"weight.places": module.places})
    with pytest.raises(ConfigError, match="outliers is 9: expected 0 to 8"):
        Q4_0Config(outliers=9)


def test_an_adapter_takes_the_blocks_as_they_are() -> None:
    module = empty("q5_1", 6, 40, bias=True)
    module.store(normal(6, 40))
    x = normal(3, 40)
    assert torch.equal(operand_linear(x, module.bias, module.operand()), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_format_version_1_loads(kind: str) -> None:
    sample = load_file(SAMPLE)
    for part, module in (("linear", empty("q4_0", 3, 40, bias=True, device="meta")), ("stack", empty(kind, 2, 2, 33))):
        prefix = f"{kind}.{part}."
        state = {name.removeprefix(prefix): tensor for name, tensor in sample.items() if name.startswith(prefix)}
        decoded = state.pop("decoded")
        module.load_state_dict(state, assign=True)
        assert module.settings().name == kind and torch.equal(module.dequantize(torch.float32), decoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"weight": s["weight"][:, :-1]}), r"weight is \[12, 53\] torch.uint8, expected \[12, 54\]"),
        (lambda s: s.update({"weight": s["weight"].float()}), "weight is .*float32, expected .*uint8"),
        (lambda s: s.pop(FACTS), "expected blocks and weight.finetune_ggml"),
        (lambda s: s.update({FACTS: pack_json({"type": "q4_0"})}), "does not hold"),
        (lambda s: s.update({FACTS: torch.zeros(3, dtype=torch.uint8)}), "is not JSON"),
        (lambda s: _facts(s, format_version=2), "format_version 2, this program reads 1"),
        (lambda s: _facts(s, type="q4_k"), "is not a storage we can read"),
        (lambda s: _facts(s, shape=[12, 71]), "has shape .12, 71., expected .12, 70."),
    ],
)
def test_a_corrupt_state_is_named(change: Any, message: str) -> None:
    module = empty("q4_0", 12, 70)
    module.store(normal(12, 70))
    state = dict(module.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        empty("q4_0", 12, 70).load_state_dict(state)


def _facts(state: dict[str, Any], **changes: Any) -> None:
    state[FACTS] = pack_json(unpack_json(state[FACTS]) | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_scales_cannot_hold_is_refused(kind: str) -> None:
    for bad, words in ((float("nan"), "holds NaN"), (float("inf"), "NaN or infinity"), (9e6, f"9e.06.*quant={kind}")):
        w_OI = normal(4, 64)
        w_OI[2, 3] = -bad
        with pytest.raises(ModelError, match=words):
            empty(kind, 4, 64).store(w_OI)
