"""QAT: what is trained is what is merged, bit for bit, on grids that every checkpoint holds; scales only, the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from adapters_models import bits, frozen, ids, logits, make, randomize
from torch import nn

from finetune import checks
from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.qat import QATConfig
from finetune.adapters.qat_layers import QATLinear, Target
from finetune.adapters.qat_scales import QATScalesConfig
from finetune.checks import check_exports, export_formats
from finetune.errors import ConfigError, ModelError
from finetune.quant.affine import Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.affine_storage import Affine
from finetune.quant.dense import DenseConfig, DenseLinear
from finetune.quant.freeze import freeze
from finetune.quant.int8_storage import Int8Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = {
    "dense": DenseConfig(),
    "int2": Int2Config(group_size=32),
    "int3 rows": Int3Config(group_size=-1),
    "int4 real": Int4Config(group_size=32, zero_point="real"),
    "int8g": Int8gConfig(group_size=64),
}
METHODS = {
    "learned": QATConfig(rank=4),
    "fitted": QATConfig(rank=4, steps="fitted"),
    "scales": QATScalesConfig(),
    "2 bits": QATConfig(rank=4, bits=2, group_size=32, symmetric=True),
    "8 bits": QATConfig(rank=4, bits=8, group_size=-1, mse=False),
    "3 bits fitted": QATConfig(rank=4, bits=3, group_size=64, steps="fitted", mse=False),
}
PAIRS = [
    *(("dense", name) for name in METHODS if name != "scales"),
    *((base, name) for base in BASES if base != "dense" for name in ("learned", "fitted", "scales")),
]


def stored(family: str, base: str) -> nn.Module:
    model = make(family)
    freeze(model, BASES[base], inspect(model))
    return model


def adapted(family: str, base: str, method: str) -> tuple[nn.Module, Adapter]:
    model = stored(family, base)
    torch.manual_seed(3)
    adapter = attach(model, copy.copy(METHODS[method]))
    randomize(adapter)
    return model, adapter


def is_bf16(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor.to(torch.bfloat16).float(), tensor.float())


@pytest.mark.parametrize(("base", "method"), PAIRS)
def test_integers_decode_to_what_is_merged_bit_for_bit(base: str, method: str) -> None:
    families = ("llama", "gpt2", "mixtral", "gpt_oss") if base in ("dense", "int4 real") else ("llama",)
    for family in families:
        _, adapter = adapted(family, base, method)
        merged = dict(adapter.merged())
        found = dict(adapter.merged_frozen())
        assert {p.name for p in adapter.projections} == set(found) == set(adapter.merged_settings())
        for p in adapter.projections:
            frozen_weight = found[p.name]
            weight = merged[p.name if p.kind == "experts" else f"{p.name}.weight"]
            decoded = frozen_weight.dequantize(torch.float32)
            assert torch.equal(decoded.T if p.kind == "conv1d" else decoded, weight)
            assert is_bf16(frozen_weight.scale) and frozen_weight.settings() == adapter.merged_settings()[p.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "method"), [("dense", "learned"), ("dense", "3 bits fitted"), ("int2", "scales")])
def test_the_integers_give_the_trained_logits_bit_for_bit(base: str, method: str, dtype: torch.dtype) -> None:
    """With the same product, that of torch; with the kernels of the storage, but for the order of their sums."""
    model, adapter = adapted("llama", base, method)
    for name, parameter in model.named_parameters():  # as a run in 16 bits has it
        if not parameter.requires_grad and parameter.is_floating_point() and "base." not in name:
            parameter.data = parameter.data.to(dtype)
    wanted = logits(model)
    found = dict(adapter.merged_frozen())
    adapter.unmount()
    for name, module in found.items():
        model.set_submodule(name, module)
    near = logits(model)
    assert (near.float() - wanted.float()).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * wanted.float().norm()
    for name, module in found.items():
        dense = DenseLinear(module.out_features, module.in_features, dtype=torch.float32)
        dense.store(module.dequantize(torch.float32))
        model.set_submodule(name, dense)
    assert torch.equal(bits(logits(model)), bits(wanted))


def test_it_starts_as_rounding_to_the_grid_does() -> None:
    model = stored("llama", "dense")
    weights = {p.name: model.get_submodule(p.name).dequantize(torch.float32) for p in inspect(model).projections}
    adapter = attach(model, QATConfig(bits=3, group_size=32, mse=False))
    assert not adapter.starts_as_base and len(weights) == 14
    for name, frozen_weight in adapter.merged_frozen():
        rounded = frozen_weight.like(frozen_weight.settings())
        rounded.scale_dtype = torch.bfloat16
        rounded.store(weights[name])
        assert torch.equal(frozen_weight.weight, rounded.weight) and torch.equal(frozen_weight.scale, rounded.scale)
    clipped = attach(stored("llama", "dense"), QATConfig(bits=3, group_size=32))
    for name, frozen_weight in clipped.merged_frozen():
        rounded = frozen_weight.like(frozen_weight.settings())
        rounded.store(weights[name])
        errors = [(w.dequantize(torch.float32) - weights[name]).norm() for w in (frozen_weight, rounded)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["learned", "fitted", "scales"])
def test_on_integers_it_starts_as_the_base_where_bfloat16_holds_its_scales(method: str) -> None:
    model = stored("llama", "int2")
    for module in model.modules():
        if isinstance(module, Affine):
            module.scale_dtype = torch.bfloat16
            module.store(torch.randn(module.shape, generator=torch.Generator().manual_seed(0)))
    wanted = {name: module.packed_state() for name, module in model.named_modules() if isinstance(module, Affine)}
    adapter = attach(model, copy.copy(METHODS[method]))
    for name, module in adapter.merged_frozen():
        state = module.packed_state()
        assert all(torch.equal(state[key], tensor) for key, tensor in wanted[name].items())


def test_codes_move_under_qat_and_stay_under_scales_only() -> None:
    for method, stays in (("learned", False), ("scales", True)):
        _, adapter = adapted("llama", "int2", method)
        for name, module in adapter.merged_frozen():
            assert torch.equal(module.weight, adapter.adapted[name].base.weight) == stays
            assert not torch.equal(module.scale, adapter.adapted[name].base.scale)


def test_without_gradients_kept_integers_give_the_same_bits() -> None:
    model, adapter = adapted("llama", "dense", "learned")
    layer = adapter.adapted["model.layers.0.mlp.down_proj"]
    for moved in (0.0, 0.5):
        with torch.no_grad():
            layer.lora_B.weight.add_(moved)
        found = logits(model)
        kept = layer._codes
        with torch.enable_grad():
            assert torch.equal(bits(model(ids(), use_cache=False).logits.detach()), bits(found))
        assert torch.equal(bits(logits(model)), bits(found)) and layer._codes is kept is not None
    assert model.train() and layer._codes is None


def test_fitted_steps_follow_the_weight_and_learned_ones_their_gradient() -> None:
    torch.manual_seed(0)
    base = DenseLinear(8, 64)
    base.store(torch.randn(8, 64))
    for learned in (False, True):
        target = Target(Int4Config(group_size=32), learned)
        layer = QATLinear(base, target, rank=2, scaling=1.0, dropout=0.0)
        with torch.no_grad():
            layer.lora_B.weight.fill_(3.0)
        before = layer.start()[0] if learned else target.fit(base.weight).scale_OG
        now = layer.merge_into_codes().scale.float()
        assert torch.equal(now, before) == learned
        layer(torch.randn(5, 64)).square().sum().backward()
        assert (layer.step is not None and layer.step.grad is not None) == learned


@pytest.mark.parametrize(("base", "method"), [("dense", "learned"), ("int4 real", "learned"), ("int2", "scales")])
def test_saved_under_our_own_name_and_for_these_integers_alone(base: str, method: str, tmp_path: Path) -> None:
    model, adapter = adapted("mixtral", base, method)
    adapter.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["finetune_method"] == METHODS[method].name and "peft_type" not in saved
    again = stored("mixtral", base)
    loaded = attach(again, type(METHODS[method])(path=str(tmp_path)))
    assert torch.equal(bits(logits(again)), bits(logits(model)))
    assert loaded.merged_settings() == adapter.merged_settings()
    with pytest.raises(ModelError, match=f"is of method {METHODS[method].name}: expected LORA"):
        attach(stored("mixtral", base), LoRAConfig(path=str(tmp_path)))


def test_a_saved_adapter_decides_its_integers(tmp_path: Path) -> None:
    adapted("llama", "dense", "2 bits")[1].save(tmp_path)
    adapter = attach(stored("llama", "dense"), QATConfig(path=str(tmp_path)))
    assert next(iter(adapter.merged_settings().values())) == Int2Config(group_size=32, symmetric=True)
    with pytest.raises(ConfigError, match=r"adapter\.bits is 3, but the adapter .* has 2: leave adapter\.bits out"):
        QATConfig(path=str(tmp_path), bits=3).check_saved(tmp_path)
    with pytest.raises(ModelError, match=r"has bits 2, but here it is 4"):
        attach(stored("llama", "dense"), QATConfig(rank=4, bits=4, group_size=32, symmetric=True)).load(tmp_path)


def test_other_bases_are_refused_by_name() -> None:
    grids = r"int2 \| int3 \| int4 \| int8g"
    for config in (NF4Config(), Int8Config()):
        expected = rf"adapter=qat trains integers, not quant={config.name}: set quant=none \| {grids}"
        with pytest.raises(ConfigError, match=expected):
            QATConfig().check_base(config)
        with pytest.raises(ConfigError, match=rf"not quant={config.name}: set quant={grids}"):
            QATScalesConfig().check_base(config)
    with pytest.raises(ConfigError, match=rf"not quant=none: set quant={grids}"):
        QATScalesConfig().check_base(DenseConfig())
    for config in (KeepConfig(), *BASES.values()):
        QATConfig().check_base(config)
    with pytest.raises(ConfigError, match=r"adapter\.bits is 3, but quant=int4 has 4: leave adapter\.bits out"):
        QATConfig(bits=3).check_base(Int4Config())
    for quant, words in (("nf4", "stored as nf4"), ("int8", "stored as int8")):
        model = frozen("llama", quant)
        before = list(model.state_dict())
        with pytest.raises(ConfigError, match=rf"trains integers, and .*q_proj is {words} here: set quant=none"):
            attach(model, QATConfig())
        assert list(model.state_dict()) == before
    with pytest.raises(ConfigError, match=r"q_proj is dense here: set quant=int2"):
        attach(frozen("llama"), QATScalesConfig())
    with pytest.raises(ConfigError, match=r"group_size is 64, but .*q_proj of the base has 32: leave"):
        attach(stored("llama", "int2"), QATConfig(group_size=64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, r"adapter\.bits is 5: expected 2, 3, 4, 8"),
        ({"group_size": 48}, r"adapter\.group_size is 48: expected a power of two from 32 to 4096, or -1"),
        ({"steps": "learnt"}, r"adapter\.steps is 'learnt': expected learned or fitted; did you mean 'learned'\?"),
        ({"dropout": 0.1}, r"adapter\.dropout is 0\.1: adapter=qat rounds W \+ B A as one weight.*: expected 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        QATConfig(**settings)
    assert "\n" not in str(raised.value)


def test_what_stays_in_floating_point_is_left_out_and_said() -> None:
    model = stored("t5", "dense")
    adapter = attach(model, QATConfig(rank=4))
    assert not any(p.dense for p in adapter.projections)
    assert "adapter=qat leaves out " in adapter.note and "DenseReluDense.wo and 3 more" in adapter.note
    model = stored("llama", "int2")
    model.set_submodule("model.layers.0.mlp.down_proj", make("llama").get_submodule("model.layers.0.mlp.down_proj"))
    for config in (QATConfig(rank=4), QATScalesConfig()):
        twin = copy.deepcopy(model)
        assert len(attach(twin, config).projections) == 13
    with torch.device("meta"):
        for config in (QATConfig(), QATScalesConfig()):
            attach(make("llama"), config)


def test_zeros_of_a_pruned_base_stay() -> None:
    model = make("llama")
    for p in inspect(model).projections:
        weight = model.get_submodule(p.name).weight
        weight.data[:, ::2] = 0
    model.config.pruning = {"method": "magnitude", "sparsity": 0.5, "pattern": "unstructured"}
    freeze(model, DenseConfig(), inspect(model))
    adapter = attach(model, QATConfig(rank=4, bits=2, group_size=32))
    randomize(adapter)
    for name, weight in adapter.merged():
        assert not weight[:, ::2].any(), name
    for name, module in adapter.merged_frozen():
        assert not module.dequantize(torch.float32)[:, ::2].any(), name


def test_which_exports_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    _, adapter = adapted("llama", "dense", "2 bits")
    assert export_formats("auto", adapter)[0] == ["safetensors", "bnb-nf4", "compressed-tensors"]
    with monkeypatch.context() as patch:
        patch.setattr(checks, "find_spec", lambda name: None)
        formats, said = export_formats("auto", adapter)
        assert formats == ["safetensors", "bnb-nf4"]
        assert "compressed-tensors: compressed_tensors is not installed, which opens it: pip install" in said
        with pytest.raises(ConfigError, match=r"compressed_tensors is not installed, which opens it"):
            check_exports(["compressed-tensors"], adapter)
    with pytest.raises(ConfigError, match=r"peft cannot be written of adapter=qat: PEFT has no such method"):
        check_exports(["peft"], adapter)
    refused = {
        "gpt2": ("dense", "learned", "no linear layer"),
        "mixtral": ("int2", "scales", "no linear layer"),
        "llama": ("int4 real", "learned", "no place for the real zero points of"),
    }
    for family, (base, method, words) in refused.items():
        _, other = adapted(family, base, method)
        with pytest.raises(ConfigError, match=words):
            check_exports(["compressed-tensors"], other)
        assert "compressed-tensors" not in export_formats("auto", other)[0]
    wide = attach(frozen("llama"), QATConfig(group_size=128))
    with pytest.raises(ConfigError, match=r"groups of 128 do not divide the 64 inputs of"):
        check_exports(["compressed-tensors"], wide)
    with pytest.raises(ConfigError, match=r"its merged weights are no integers, as those of adapter=qat"):
        check_exports(["compressed-tensors"], attach(frozen("llama"), LoRAConfig()))


def test_in_bf16_gradients_come_in_the_factors_own_dtype() -> None:
    for method, base in (("learned", "dense"), ("scales", "int2")):
        model, adapter = adapted("llama", base, method)
        model.train()
        model(ids(), use_cache=False).logits.square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in adapter.trainable().values())
