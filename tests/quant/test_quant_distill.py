"""Layer-by-layer distillation: gradients behind the codes, what is kept, every kind of projection and of storage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, MixtralConfig

from finetune.errors import ConfigError
from finetune.quant.affine import Int2Config, Int3Config
from finetune.quant.base import QUANTIZERS, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.distill import DistillConfig, Distiller, _Linear, _Stack
from finetune.quant.driver import Driver
from finetune.quant.freeze import freeze
from finetune.quant.ggml import Q4_0Config
from finetune.quant.nf4 import NF4Config
from finetune.quant.packed import PackedWeight
from finetune.quant.pruners.sparsegpt import SparseGPT, SparseGPTConfig
from finetune.quant.recipe import Recipe
from finetune.quant.replay import record, run
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.rounders.rtn import RTN
from finetune.quant.w8a8 import W4A8Config, W6A6Config
from finetune.structure import inspect

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "bert": BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, is_decoder=True),
}
STEPS = DistillConfig(steps=12, learning_rate=0.02, targets="same")


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def batches(count: int = 3) -> list[dict[str, Any]]:
    ids = torch.randint(1, 64, (count, 6, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "use_cache": False} for part in ids]


def quantized(model: Any, quant: QuantConfig, config: DistillConfig | None, rounder: Any = None, **options: Any) -> Any:
    twin, distiller = copy.deepcopy(model), None if config is None else Distiller(config)
    Driver(twin, inspect(twin), Recipe(quant, rounder or RTN(), distiller=distiller, **options), batches()).go()
    return twin, distiller


CASES: list[tuple[str, QuantConfig, torch.dtype]] = [
    ("llama", Int2Config(group_size=32), torch.float32),
    ("llama", Int3Config(group_size=32), torch.bfloat16),
    ("llama", W4A8Config(group_size=16), torch.float32),
    ("llama", W6A6Config(activations="tensor", static=True), torch.float32),
    ("llama", NF4Config(double_quant=True), torch.float32),
    ("llama", Q4_0Config(), torch.float32),
    ("gpt2", Int2Config(group_size=32, symmetric=True), torch.float32),
    ("bert", Int3Config(group_size=32), torch.float32),  # finished parts lie within one another
    ("mixtral", Int3Config(group_size=32), torch.float32),
    ("mixtral", W4A8Config(group_size=16), torch.float32),
]


@pytest.mark.parametrize(("family", "quant", "dtype"), CASES, ids=[f"{f}-{q.name}-{d}" for f, q, d in CASES])
def test_blocks_come_nearer_to_the_dense_ones(family: str, quant: QuantConfig, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    trained, distiller = quantized(model, quant, STEPS)
    structure = inspect(model)
    assert [each.block for each in distiller.done] == list(structure.blocks)
    share = 0.97 if dtype == torch.float32 and quant.name != "w6a6" else 1.0  # where rounding inputs errs more
    assert all(each.after <= share * each.before for each in distiller.done)
    assert all(not parameter.requires_grad for parameter in trained.parameters())
    assert [name for name, _ in trained.named_modules()] == [name for name, _ in _modules(model)]
    # What is reported is the error of what is stored, against the dense block on the same inputs.
    last = structure.blocks[-1]
    calls = record(trained, [last], batches())
    error = energy = 0.0
    for hidden, call in zip(calls.hidden, calls.arguments[0], strict=True):
        with torch.no_grad():
            target, output = (
                run(model.get_submodule(last), hidden, call),
                run(trained.get_submodule(last), hidden, call),
            )
        error += float((output.double() - target.double()).square().sum())
        energy += float(target.double().square().sum())
    assert error / energy == pytest.approx(distiller.done[-1].after, rel=1e-3)


def _modules(model: Any) -> Any:
    """Of a model with everything in its place; stacks of experts become modules."""
    twin = copy.deepcopy(model)
    freeze(twin, DenseConfig(), inspect(twin))
    return twin.named_modules()


def test_norms_and_codes_move_and_scales_stay() -> None:
    model, quant = model_of("llama"), Int2Config(group_size=32)
    plain, _ = quantized(model, quant, None)
    trained, _ = quantized(model, quant, STEPS)
    before, after = (twin.model.layers[0] for twin in (plain, trained))
    assert not torch.equal(before.input_layernorm.weight, after.input_layernorm.weight)
    assert torch.equal(plain.model.norm.weight, trained.model.norm.weight)  # of no block
    projection, same = after.mlp.up_proj, before.mlp.up_proj
    assert torch.equal(projection.scale, same.scale) and torch.equal(projection.zero, same.zero)
    assert not torch.equal(projection.weight, same.weight)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_block_that_did_not_come_nearer_stays_bit_for_bit(family: str) -> None:
    model, quant = model_of(family), W4A8Config(group_size=16)
    plain, _ = quantized(model, quant, None)
    told: list[str] = []
    distiller = Distiller(DistillConfig(steps=3, learning_rate=0.99))
    distiller.told = lambda what, step, of: told.append(what)
    twin = copy.deepcopy(model)
    Driver(twin, inspect(twin), Recipe(quant, distiller=distiller), batches()).go()
    assert all(each.after == each.before > 0 for each in distiller.done)
    ours, theirs = twin.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(told) == 2 * 3 and told[2].startswith("distilled model.layers.0: error ")


@pytest.mark.parametrize("quant", [Int3Config(group_size=32), W4A8Config(group_size=16)], ids=lambda q: q.name)
def test_the_gradient_behind_the_codes_is_that_of_the_stored_weight(quant: QuantConfig) -> None:
    generator = torch.Generator().manual_seed(2)
    w, x, to = (torch.randn(*shape, generator=generator) for shape in ((24, 48), (10, 48), (10, 24)))
    module = QUANTIZERS.build(quant, 24, 48)
    module.store(w)
    part = _Linear(module, module.fit(w), w)
    with part.attached():
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * to).sum().backward()
    stored = module.dequantize(torch.float32).requires_grad_()
    exact = x.clone().requires_grad_()
    (F.linear(exact, stored) * to).sum().backward()
    torch.testing.assert_close(part.behind.grad, stored.grad)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-4, atol=1e-4)
    part.write()
    assert torch.equal(module(x), y)  # nothing was moved: the same codes


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_trained_in_the_layout_that_the_model_reads(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w_EOI, x = torch.randn(3, 24, 32, generator=generator), torch.randn(5, 32, generator=generator)
    quant = Int3Config(group_size=32)
    parent = torch.nn.Module()
    parent.up = QUANTIZERS.build(quant, 24, 32, experts=3, transposed=transposed)
    parent.up.store(w_EOI.mT if transposed else w_EOI)
    stack = parent.up
    part = _Stack(parent, "up", stack, stack.fit(w_EOI), w_EOI)
    with part.attached():
        w = parent.up[1]
        (x @ (w if transposed else w.T)).square().sum().backward()
        part.collect()
    assert parent.up is stack
    stored = stack.decode(torch.float32).requires_grad_()
    (x @ stored[1].T).square().sum().backward()
    torch.testing.assert_close(part.behind.grad, stored.grad)


def test_what_a_rounder_chose_is_where_training_starts() -> None:
    model, quant = model_of("llama"), Int2Config(group_size=32)
    plain, _ = quantized(model, quant, None, GPTQ())
    trained, distiller = quantized(model, quant, DistillConfig(steps=1, learning_rate=1e-7), GPTQ())
    for name, module in plain.named_modules():
        if isinstance(module, PackedWeight) and ".0." in name:
            assert torch.equal(module.decode(torch.float32), trained.get_submodule(name).decode(torch.float32))
    _, more = quantized(model, quant, STEPS, GPTQ())
    assert all(one.after < 0.97 * one.before for one in more.done)
    assert more.done[0].before == pytest.approx(distiller.done[0].before)


def test_zeros_of_a_pruner_stay_zero() -> None:
    model, quant = model_of("llama"), Int3Config(group_size=32, symmetric=True)
    for config in (SparseGPTConfig(sparsity=0.5), SparseGPTConfig(pattern="2:4")):
        trained, distiller = quantized(model, quant, STEPS, pruner=SparseGPT(config))
        plain, _ = quantized(model, quant, None, pruner=SparseGPT(config))
        assert all(each.after < each.before for each in distiller.done)
        before, after = (twin.model.layers[0].mlp.up_proj.dequantize(torch.float32) for twin in (plain, trained))
        assert bool((after[before == 0] == 0).all()) and not torch.equal(before, after)


def test_targets_are_what_the_dense_model_has_there() -> None:
    model, quant = model_of("llama"), Int2Config(group_size=32)
    trained, distiller = quantized(model, quant, DistillConfig(steps=4))
    outputs = []
    for twin in (model, trained):
        kept: list[Tensor] = []
        handle = twin.model.layers[-1].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        with torch.no_grad():
            for batch in batches():
                twin(**batch)
        handle.remove()
        outputs.append(torch.cat([out[0] if isinstance(out, tuple) else out for out in kept]).double())
    dense, stored = outputs
    error = float((dense - stored).square().sum() / dense.square().sum())
    assert distiller.done[-1].after == pytest.approx(error, rel=1e-3)


def test_the_model_as_a_whole_comes_nearer() -> None:
    model, quant = model_of("llama"), Int2Config(group_size=32)
    ids = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(9))

    def error(twin: Any) -> Tensor:
        with torch.no_grad():
            return (twin(input_ids=ids).logits - model(input_ids=ids).logits).norm()

    plain, _ = quantized(model, quant, None)
    for targets in ("dense", "same"):
        trained, _ = quantized(model, quant, DistillConfig(steps=40, learning_rate=0.02, targets=targets))
        assert error(trained) < 0.92 * error(plain)
    assert any(isinstance(module, FrozenWeight) for module in trained.modules())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, r"distill\.steps is -1: expected 0 \(no distillation\) or more"),
        ({"learning_rate": 0.0}, r"distill\.learning_rate is 0\.0: expected between 0 and 1"),
        ({"targets": "paper"}, r"distill\.targets is paper: expected dense or same"),
        ({"batch_tokens": 0}, r"distill\.batch_tokens is 0: expected 1 or more"),
    ],
    ids=["steps", "rate", "targets", "tokens"],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DistillConfig(**settings)
