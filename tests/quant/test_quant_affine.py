"""Affine integer storage: the grid, what is refused, whole models, and files of every format version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import affine, native
from finetune.quant.affine import AffineExperts, AffineLinear, Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.affine_grid import AffineGrid
from finetune.quant.affine_storage import FACTS
from finetune.quant.base import QUANTIZERS
from finetune.quant.facts import pack_json, unpack_json
from finetune.quant.freeze import freeze
from finetune.structure.inspect import inspect

CONFIGS = [Int8gConfig, Int4Config, Int3Config, Int2Config]
KINDS = [("none", True, "integer"), ("integer", False, "integer"), ("real", False, "real")]
SAMPLE = Path(__file__).parent / "affine_v1.safetensors"


def grid(w: torch.Tensor, bits: int, group_size: int, kind: str) -> AffineGrid:
    return AffineGrid.fit(w, bits, group_size, symmetric=kind == "none", zero_point=kind)


def filled(config: Any, out_features: int = 12, in_features: int = 70, **options: Any) -> Any:
    module = QUANTIZERS.build(config, out_features, in_features, **options)
    shape = (options["experts"],) if "experts" in options else ()
    module.store(torch.randn(*shape, out_features, in_features, generator=torch.Generator().manual_seed(0)))
    return module


@given(
    st.integers(1, 9), st.integers(1, 150), st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 32, 64]),
    st.sampled_from(["none", "integer", "real"]), st.floats(-3, 3), st.sampled_from([1e-9, 1.0, 1e4]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_codes_are_the_nearest_and_no_weight_is_further_than_half_a_step(
    rows: int, width: int, bits: int, group_size: int, kind: str, shift: float, size: float
) -> None:
    w = (torch.randn(rows, width) + shift) * size
    found = grid(w, bits, group_size, kind)
    codes = found.encode(w)
    decoded = found.decode(codes)
    step = affine.spread(found.scale_OG.float(), width, group_size)
    error = (decoded - w).abs()
    # The range of codes ends half a step early on one side (symmetric), or where rounding put it.
    slack = 1.0 if kind == "integer" else 0.51
    assert (error <= slack * step * (1 + 2e-3) + 2**-11 * w.abs()).all()
    for other in (-1, 1):
        neighbour = (codes.int() + other).clamp(0, 2**bits - 1).to(torch.uint8)
        assert (error <= (found.decode(neighbour) - w).abs() + 1e-4 * step).all()
    packed = affine.pack(codes, bits)
    stored = (packed, found.scale_OG, found.zero_OG, bits, group_size, [rows, width], torch.float32)
    assert torch.equal(affine.dequantize_affine(*stored), decoded)


@pytest.mark.parametrize("kind", ["none", "integer", "real"])
def test_columns_can_be_rounded_run_by_run(kind: str) -> None:
    w = torch.randn(5, 150)
    found = grid(w, 4, 64, kind)
    runs = [(0, 10), (10, 64), (64, 65), (65, 150)]
    codes = torch.cat([found.round_columns(w[:, a:b], a) for a, b in runs], dim=1)
    assert torch.equal(codes, found.encode(w))
    values = torch.cat([found.decode(codes[:, a:b], a) for a, b in runs], dim=1)
    assert torch.equal(values, found.decode(codes))


@given(
    st.integers(1, 9), st.integers(1, 150), st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 32, 64]),
    st.sampled_from(["none", "integer", "real"]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_compiled_kernels_choose_and_pack_the_same_codes(
    rows: int, width: int, bits: int, group_size: int, kind: str, dtype: torch.dtype
) -> None:
    w = (torch.randn(rows, width) + 0.3).to(dtype)
    found = grid(w, bits, group_size, kind)
    for level in native.LEVELS:
        with native.at_most(level):
            assert torch.equal(found.encode_packed(w), affine.pack(found.encode(w), bits)), level


def test_integer_zero_points_hold_zero_exactly() -> None:
    """Pruned weights stay pruned; real zero points need not."""
    w = torch.randn(20, 64) + 2
    w[:, ::3] = 0
    for bits in (2, 3, 4, 8):
        found = grid(w, bits, 32, "integer")
        assert (found.decode(found.encode(w))[:, ::3] == 0).all()


def test_scales_are_half_floats_where_those_are_normal() -> None:
    w = torch.randn(4, 64)
    assert grid(w, 4, 32, "integer").scale_OG.dtype == torch.float16
    tiny = w.clone()
    tiny[0, :32] *= 1e-6
    assert grid(tiny, 4, 32, "integer").scale_OG.dtype == torch.float32
    assert grid(w * 1e7, 4, 32, "integer").scale_OG.dtype == torch.float32
    level = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 0.7)], dim=1)  # groups without span
    for kind in ("none", "integer", "real"):
        found = grid(level, 4, 32, kind)
        torch.testing.assert_close(found.decode(found.encode(level)), level, rtol=0.07, atol=0)


def test_a_stack_with_one_tiny_expert_keeps_all_scales_in_full() -> None:
    module = QUANTIZERS.build(Int4Config(), 8, 64, experts=3)
    w = torch.randn(3, 8, 64)
    w[1] *= 1e-7
    module.store(w)
    assert module.scale.dtype == torch.float32
    assert ((module.dequantize(torch.float32) - w).flatten(1).norm(dim=1) < 0.2 * w.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize(("kind", "symmetric", "zero_point"), KINDS)
@pytest.mark.parametrize("kind_of", CONFIGS)
def test_modules_say_their_settings_and_their_size(kind_of: Any, kind: str, symmetric: bool, zero_point: str) -> None:
    config = kind_of(group_size=32, symmetric=symmetric, zero_point=zero_point)
    module = filled(config, 16, 64)
    assert module.settings() == config and module.requantize(torch.randn(16, 64)).settings() == config
    overhead = {"none": 16, "integer": 24, "real": 48}[kind] / 32
    assert module.bits_per_weight() == config.bits + overhead
    assert module.to(torch.bfloat16).scale.dtype == torch.float16 and module.dtype == torch.bfloat16
    assert config.name in repr(module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 48}, "quant.group_size is 48: expected a power of two from 32 to 4096, or -1"),
        ({"group_size": 0}, "quant.group_size is 0: expected"),
        ({"group_size": 8192}, "quant.group_size is 8192: expected"),
        ({"zero_point": "float"}, "quant.zero_point is float: expected integer or real"),
        ({"symmetric": True, "zero_point": "real"}, "quant.symmetric=true has no zero points: expected"),
    ],
)
@pytest.mark.parametrize("kind_of", CONFIGS)
def test_settings_out_of_range_are_one_line(kind_of: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        kind_of(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        QUANTIZERS.build(Int4Config(), 4, 64).store(w)


def test_a_file_of_format_version_1_loads() -> None:
    """The states of an int4 linear and of an int3 stack with real zero points, and what they decode to."""
    state = load_file(SAMPLE)
    linear = QUANTIZERS.build(Int4Config(), 3, 40, bias=True, device="meta")
    linear.load_state_dict({k.removeprefix("a."): v for k, v in state.items() if k.startswith("a.")}, assign=True)
    assert linear.settings() == Int4Config(group_size=32)
    stack = QUANTIZERS.build(Int3Config(), 2, 33, experts=2)
    stack.load_state_dict({k.removeprefix("b."): v for k, v in state.items() if k.startswith("b.")})
    assert stack.settings() == Int3Config(group_size=-1, zero_point="real")
    for module, name in ((linear, "a"), (stack, "b")):
        assert torch.equal(module.dequantize(torch.float32), state[f"decoded.{name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight.scale"), "weight.scale is missing"),
        (lambda s: s.update({"weight.scale": s["weight.scale"][:, :1]}), "weight.scale is .*expected"),
        (lambda s: s.update({"weight.zero": s["weight.zero"].float()}), "weight.zero is .*float32, expected .*uint8"),
        (lambda s: s.update({FACTS: pack_json({"bits": 4})}), "does not hold"),
        (lambda s: s.update({FACTS: torch.zeros(3, dtype=torch.uint8)}), "is not JSON"),
        (lambda s: _facts(s, format_version=2), "format_version 2, this program reads 1"),
        (lambda s: _facts(s, bits=5), "is not a storage we can read"),
        (lambda s: _facts(s, group_size=0), "is not a storage we can read"),
        (lambda s: _facts(s, shape=[12, 71]), "has shape .12, 71., expected .12, 70."),
    ],
)
def test_a_corrupt_state_is_named(change: Any, message: str) -> None:
    module = filled(Int4Config())
    state = dict(module.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        QUANTIZERS.build(Int4Config(), 12, 70).load_state_dict(state)


def _facts(state: dict[str, Any], **changes: Any) -> None:
    state[FACTS] = pack_json(unpack_json(state[FACTS]) | changes)


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("config", [Int8gConfig(), Int4Config(), Int2Config(group_size=32, zero_point="real")], ids=str)
def test_a_frozen_mixture_computes_with_its_decoded_weights(config: Any) -> None:
    """And so do the gradients of its embeddings, though no dense weight is kept for them."""
    model = _mixtral()
    dense = _mixtral()
    freeze(model, config, inspect(model))
    kinds = {type(module) for module in model.modules()}
    assert {AffineLinear, AffineExperts} <= kinds
    for projection in inspect(dense).projections:
        decoded = model.get_submodule(projection.name).dequantize(torch.float32)
        parent, _, leaf = projection.name.rpartition(".")
        owner = dense.get_submodule(parent)
        (owner if projection.kind == "experts" else getattr(owner, leaf)).register_parameter(
            leaf if projection.kind == "experts" else "weight", nn.Parameter(decoded)
        )
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    gradients = []
    for one in (model, dense):
        embeddings = one.get_input_embeddings().weight.requires_grad_()
        loss = one(ids, labels=ids).loss
        loss.backward()
        gradients.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-6)


def test_an_expert_keeps_no_dense_weight_for_the_backward() -> None:
    module = filled(Int4Config(), 64, 128, experts=2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        torch.nn.functional.linear(torch.randn(3, 128, requires_grad=True), module[1])
    assert sum(kept) <= 64 * 128 * 5 // 8
