"""DoRA and LoRA+: PEFT's logits both ways, norms without the sum, a constant norm in the backward pass, groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import dense_twin, frozen, logits, loss, pefts, randomize

from finetune.adapters.attach import attach
from finetune.adapters.dora import DoRAConfig, DoRALinear
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.lora_plus import LoRAPlusConfig
from finetune.errors import ConfigError, ModelError
from finetune.quant.affine import Int8gConfig
from finetune.quant.base import QUANTIZERS
from finetune.quant.int8 import Int8Config
from finetune.quant.nf4 import NF4Config

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
SETTINGS = {"rank": 4, "alpha": 8.0}


def moved(family: str = "llama", quant: str = "dense", **settings: object):
    model = frozen(family, quant)
    torch.manual_seed(3)
    adapter = attach(model, DoRAConfig(**SETTINGS | settings))
    randomize(adapter)
    return model, adapter


@pytest.mark.parametrize("quant", ["dense", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_stock_peft_gives_our_logits(family: str, quant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = moved(family, quant, rslora=family == "opt")
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    theirs = peft.PeftModel.from_pretrained(dense_twin(family, quant), str(tmp_path)).eval()
    mine = logits(model)
    assert (logits(theirs) - mine).abs().max() <= BAR
    assert (logits(theirs.merge_and_unload()) - mine).abs().max() <= BAR


def test_pefts_adapter_loads_here_and_goes_on(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    theirs = pefts(dense_twin("llama"), peft.LoraConfig(**settings), tmp_path)
    model = frozen("llama")
    attach(model, DoRAConfig(path=str(tmp_path)))
    assert (logits(model) - logits(theirs)).abs().max() <= BAR


def layer() -> DoRALinear:
    """A linear layer with DoRA that has moved off its start."""
    torch.manual_seed(0)
    base = QUANTIZERS.build(NF4Config(), 48, 64, bias=True, dtype=torch.float32, device=None)
    base.store(torch.randn(48, 64))
    base.bias.data.normal_()
    module = DoRALinear(base, rank=4, scaling=2.0, dropout=0.0).train()
    with torch.no_grad():
        module.lora_B.weight.normal_(std=0.3)
        module.lora_magnitude_vector.add_(torch.randn(48))
    return module


@pytest.mark.parametrize("config", [NF4Config(), Int8Config(), Int8gConfig(group_size=32)], ids=lambda c: c.name)
def test_norms_are_those_of_the_sum(config) -> None:
    torch.manual_seed(0)
    base = QUANTIZERS.build(config, 48, 64, bias=True, dtype=torch.float32, device=None)
    base.store(torch.randn(48, 64))
    module = DoRALinear(base, rank=4, scaling=2.0, dropout=0.0)
    assert torch.equal(module.norm(torch.float32), module.lora_magnitude_vector)
    with torch.no_grad():
        module.lora_B.weight.normal_()
    summed = base.dequantize(torch.float64) + 2 * (module.lora_B.weight @ module.lora_A.weight).double()
    assert torch.allclose(module.norm(torch.float32).double(), summed.norm(dim=1), rtol=2e-6)


def test_gradients_hold_the_norm_constant() -> None:
    module = layer()
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 48)
    module(x).backward(grad)
    leaves = [t.detach().double().requires_grad_() for t in
              (x, module.lora_A.weight, module.lora_B.weight, module.lora_magnitude_vector)]  # fmt: skip
    x64, a, b, m = leaves
    w = module.base.dequantize(torch.float64) + 2 * b @ a
    y = x64 @ (w * (m / w.detach().norm(dim=1))[:, None]).T + module.base.bias.double()
    assert torch.allclose(module(x).double(), y, rtol=1e-5, atol=1e-5)
    y.backward(grad.double())
    mine = (x.grad, module.lora_A.weight.grad, module.lora_B.weight.grad, module.lora_magnitude_vector.grad)
    for found, wanted in zip(mine, leaves, strict=True):
        assert (found - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


@pytest.mark.parametrize("quant", ["dense", "int8"])
def test_models_may_add_residuals_to_outputs_in_place(quant: str) -> None:
    """Falcon adds attention's output to the feed-forward's where that stands, which the backward pass still reads."""
    model, adapter = moved("falcon", quant)
    model.train()
    loss(model).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.trainable().values())


def test_norms_follow_what_is_written_also_while_they_are_kept() -> None:
    model, adapter = moved()
    model.eval()
    module = adapter.adapted["model.layers.0.self_attn.q_proj"]
    before = logits(model)
    assert module._kept is not None and module.norm(torch.float32) is module._kept[1]
    with torch.no_grad():
        module.lora_B.weight.mul_(3)
    assert not torch.equal(logits(model), before)
    again, other = moved()
    with torch.no_grad():
        other.adapted["model.layers.0.self_attn.q_proj"].lora_B.weight.mul_(3)
    assert torch.equal(logits(again), logits(model))


def test_norms_follow_an_optimizer_that_leaves_no_trace() -> None:
    model, adapter = moved()
    model.eval()
    before = logits(model)
    model.train()
    loss(model)
    module = adapter.adapted["model.layers.0.self_attn.q_proj"]
    module.lora_B.weight.data.mul_(3)
    model.eval()
    with torch.no_grad():
        assert torch.equal(
            module.norm(torch.float32), module._norm(module.lora_A.weight, module.lora_B.weight, torch.float32)
        )
    assert not torch.equal(logits(model), before)


def test_compiled_it_computes_the_same() -> None:
    module = layer()
    found = []
    for call in (module, torch.compile(module, backend="aot_eager")):
        x = torch.linspace(-1, 1, 5 * 64).view(5, 64).requires_grad_()
        module.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, module.lora_magnitude_vector.grad, module.lora_A.weight.grad.clone()])
    for eager, compiled in zip(*found, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5)


def test_each_method_names_the_other(tmp_path: Path) -> None:
    moved()[1].save(tmp_path / "dora")
    attach(frozen("llama"), LoRAConfig(**SETTINGS)).save(tmp_path / "lora")
    with pytest.raises(ModelError, match="has use_dora=true, which adapter=lora does not compute: set adapter=dora"):
        attach(frozen("llama"), LoRAConfig(path=str(tmp_path / "dora")))
    with pytest.raises(ModelError, match="has use_dora=false, which adapter=dora does not compute: set adapter=lora"):
        attach(frozen("llama"), DoRAConfig(path=str(tmp_path / "lora")))
    with pytest.raises(ConfigError, match="adapter=dora cannot adapt stacked experts such as"):
        attach(frozen("mixtral"), DoRAConfig())


def test_bf16_magnitudes_start_as_the_base() -> None:
    model = frozen("llama", "nf4")
    wanted = logits(model)
    attach(model, DoRAConfig(dtype="bf16"))
    assert torch.equal(logits(model), wanted)


def test_lora_plus_is_lora_with_a_faster_b(tmp_path: Path) -> None:
    plus = attach(frozen("llama"), LoRAPlusConfig(**SETTINGS, ratio=8.0))
    scales = plus.learning_rate_scales()
    assert scales == {name: 8.0 for name in plus.trainable() if "lora_B" in name} and scales
    assert attach(frozen("llama"), LoRAConfig()).learning_rate_scales() == {}
    plus.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and "ratio" not in saved
    attach(frozen("llama"), LoRAConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"adapter.ratio is 0: expected more than 0"):
        LoRAPlusConfig(ratio=0)
