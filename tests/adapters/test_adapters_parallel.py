"""Parallel adapters: where they read and add in each family, their formula, saving, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapters_models import COMMON, DECODER, MOE, VOCABULARY, WIDE, bits, frozen_or_plain, ids, logits, randomize
from torch import Tensor

from finetune.adapters.attach import attach
from finetune.adapters.parallel import Entrance, ParallelConfig
from finetune.checks import check_exports
from finetune.errors import ConfigError, ModelError
from finetune.structure import inspect

T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES = {
    "llama": (None, "mlp.gate_proj", "mlp.down_proj"),
    "gpt2": (None, "mlp.c_fc", "mlp.c_proj"),
    "opt": (None, "fc1", "fc2"),
    "mixtral": (None, "mlp", "mlp"),
    "gpt_oss": (None, "mlp", "mlp"),
    "Falcon": (WIDE, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "Phi": (WIDE | {"intermediate_size": 96}, "mlp.fc1", "mlp.fc2"),
    "Phi3": (COMMON | DECODER, "mlp.gate_up_proj", "mlp.down_proj"),
    "Bloom": (WIDE, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "GPTNeoX": (WIDE | {"intermediate_size": 96}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "Gemma2": (COMMON | DECODER | {"head_dim": 16}, "mlp.gate_proj", "mlp.down_proj"),
    "Qwen2Moe": (COMMON | DECODER | MOE, "mlp", "mlp"),
}


def model_of(family: str) -> torch.nn.Module:
    return frozen_or_plain(family, FAMILIES[family][0])


def adapted(family: str, **settings: object):
    model = model_of(family)
    torch.manual_seed(3)
    return model, attach(model, ParallelConfig(**{"width": 4, **settings}))


def inputs_of(model: torch.nn.Module, name: str) -> Tensor:
    """What the module of that name reads."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_adds_to_the_feedforward_what_the_bottleneck_makes_of_its_input(family: str) -> None:
    """Checked in the model as it was, by a hook on the module that ends the feed-forward."""
    _, first, last = FAMILIES[family]
    plain = model_of(family)
    before = logits(plain)
    model, adapter = adapted(family)
    assert torch.equal(bits(logits(model)), bits(before))
    places = {name.split(".bottleneck.")[0] for name in adapter.trainable()}
    blocks = inspect(plain).blocks
    assert places == {f"{block}.{last}" for block in blocks}
    randomize(adapter, 0.3)
    b = {name.split(f"{blocks[0]}.{last}.bottleneck.")[-1]: p.detach() for name, p in adapter.trainable().items()}
    x = inputs_of(plain, f"{blocks[0]}.{first}")
    change = 4 * (F.relu(x @ b["down_weight"].T + b["down_bias"]) @ b["up_weight"].T + b["up_bias"])

    def add(_module: object, _args: object, output: object) -> object:
        y = output[0] if isinstance(output, tuple) else output
        y = y + change.view_as(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for name in [n for n in adapter.trainable() if blocks[0] not in n]:  # the other block's stays as it began
        adapter.trainable()[name].data.zero_()
    plain.get_submodule(f"{blocks[0]}.{last}").register_forward_hook(add)
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(bits(logits(model)), bits(before))
    with adapter.detached():
        assert torch.equal(bits(logits(model)), bits(before))
        assert not any(isinstance(module, Entrance) for module in model.modules())


def test_an_encoder_and_a_pair_of_stacks() -> None:
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=48)
    ).eval()  # fmt: skip
    before = logits(bert)
    adapter = attach(bert, ParallelConfig(width=4))
    assert torch.equal(bits(logits(bert)), bits(before))
    ends = {name.split(".bottleneck.")[0] for name in adapter.trainable() if ".bottleneck." in name}
    assert ends == {f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)}
    assert {e.passage for e in bert.modules() if isinstance(e, Entrance)} == set(adapter.passages.values())
    pair = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    adapter = attach(pair, ParallelConfig(width=4))
    randomize(adapter)
    pair(input_ids=ids(), decoder_input_ids=ids()).logits.sum().backward()
    ends = {name.split(".bottleneck.")[0] for name in adapter.trainable()}
    assert len(ends) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.trainable().values())


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_gradients_with_checkpointing_are_those_without(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model, adapter = adapted(family)
        randomize(adapter)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        grads.append([p.grad for p in adapter.trainable().values()])
        assert all(passage.x_BH is None for passage in adapter.passages.values())
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_gradients_are_those_of_float64() -> None:
    model, adapter = adapted("llama")
    randomize(adapter)
    wide = copy.deepcopy(model).double()
    for one in (model, wide):
        one(ids(), labels=ids(), use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) == set(adapter.trainable())
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm()


def test_starts_as_the_factors_of_lora_do() -> None:
    _, adapter = adapted("llama", width=16, scale=2.0)
    down, up = (
        next(p for n, p in adapter.trainable().items() if n.endswith(end)) for end in ("down_weight", "up_weight")
    )
    assert 0.9 / 8 < down.abs().max() <= 1 / 8  # uniform up to 1 / sqrt(in)
    assert not up.any()


def test_saved_and_loaded_with_its_scale(tmp_path: Path) -> None:
    model, adapter = adapted("llama", targets=["layers.1.*"], scale=1.5, norms=True)
    randomize(adapter)
    adapter.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["scale"], saved["targets"]) == (1.5, ["model.layers.1.mlp.down_proj"])
    other = model_of("llama")
    attach(other, ParallelConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(other)), bits(logits(model)))
    _, another = adapted("llama", targets=["layers.1.*"], norms=True)
    with pytest.raises(ModelError, match=r"has scale 1\.5, but here it is 4\.0"):
        another.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"adapter\.scale is 0\.0: expected more than 0"),
        ({"scale": float("nan")}, r"adapter\.scale is nan"),
        ({"width": 0}, r"adapter\.width is 0"),
        ({"targets": ["o_proj"]}, r"'o_proj' ends no sub-layer that adapter=parallel can follow; have down_proj"),
    ],
)
def test_refusals(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        adapted("llama", **settings)
    assert "\n" not in str(raised.value)


def test_does_not_merge() -> None:
    _, adapter = adapted("llama")
    with pytest.raises(ConfigError, match="beside a feed-forward through an activation"):
        check_exports(["safetensors"], adapter)
