"""QA-LoRA: the paper's formula, PEFT's up to a factor, and a merge into zero points that rounds nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from adapters_models import bits, frozen, ids, logits, make, randomize
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.qa_lora import QALoRAConfig, QALoRALinear
from finetune.checks import check_exports
from finetune.errors import ConfigError, ModelError
from finetune.quant.affine import Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.base import QUANTIZERS
from finetune.quant.freeze import freeze
from finetune.quant.int8 import Int8Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = {
    "int4": Int4Config(group_size=32),
    "int4 real": Int4Config(group_size=32, zero_point="real"),
    "int3": Int3Config(group_size=64),
    "int2": Int2Config(group_size=32),
    "int8g": Int8gConfig(group_size=32),
    "rows": Int4Config(group_size=-1),
}


def layer(config, width: int = 160, dtype: torch.dtype = torch.float32) -> QALoRALinear:
    torch.manual_seed(0)
    base = QUANTIZERS.build(config, 48, width, bias=True, dtype=torch.float32, device=None)
    base.store(torch.randn(48, width) * 0.1)
    base.bias.data.normal_()
    module = QALoRALinear(base, rank=4, scaling=2.0, dropout=0.0)
    with torch.no_grad():
        module.lora_B.weight.normal_()
    return module


def stored(family: str, name: str = "int4"):
    model = make(family)
    freeze(model, BASES[name], inspect(model))
    return model


def adapted(family: str, name: str = "int4", **settings: object):
    model = stored(family, name)
    torch.manual_seed(3)
    adapter = attach(model, QALoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}))
    randomize(adapter)
    return model, adapter


@pytest.mark.parametrize("width", [160, 96, 80])
def test_the_formula_is_the_papers(width: int) -> None:
    """Algorithm 1: QA(x) * group size, then A, then B; where the last group is short, its own sum."""
    module = layer(BASES["int4"], width)
    x = torch.randn(5, width)
    whole = width // 32 * 32
    pooled = F.avg_pool1d(x[:, None, :whole], 32)[:, 0] * 32
    if whole < width:
        pooled = torch.cat([pooled, x[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    wanted = module.base(x) + 2 * pooled @ module.lora_A.weight.T @ module.lora_B.weight.T
    assert module.lora_A.weight.shape == (4, pooled.shape[1])
    assert (module(x) - wanted).norm() <= 1e-5 * wanted.norm()


def test_pefts_formula_is_ours_times_the_groups_over_their_size() -> None:
    variants = pytest.importorskip("peft.tuners.lora.variants")
    module = layer(BASES["int4"])
    x = torch.randn(3, 7, 160)
    factors = {"lora_A": module.lora_A.weight, "lora_B": module.lora_B.weight}
    theirs = SimpleNamespace(
        **{name: {"default": SimpleNamespace(weight=weight)} for name, weight in factors.items()},
        lora_dropout={"default": nn.Identity()}, scaling={"default": 2.0}, qalora_group_size={"default": 32},
        training=False, in_features=160,
    )  # fmt: skip
    change = variants.QALoraLinearVariant.forward(theirs, "default", x, torch.zeros(3, 7, 48))
    mine = module(x) - module.base(x)
    assert (change * 32 / 5 - mine).norm() <= 1e-5 * mine.norm()


@pytest.mark.parametrize("width", [160, 80])
@pytest.mark.parametrize("name", BASES)
def test_it_merges_into_zero_points_and_rounds_nothing_else(name: str, width: int) -> None:
    module = layer(BASES[name], width)
    merged = module.merge_into(module.base)
    assert torch.equal(merged.weight, module.base.weight) and torch.equal(merged.scale, module.base.scale)
    assert merged.zeros == "real" and merged.zero.dtype == torch.float32 and torch.equal(merged.bias, module.base.bias)
    x = torch.randn(9, width)
    wanted = module(x)
    assert (merged(x) - wanted).norm() <= 1e-5 * wanted.norm()
    dense = module.merge(module.base.dequantize(torch.float32))
    assert (merged.dequantize(torch.float32) - dense).abs().max() <= 1e-5 * dense.abs().max()
    again = merged.requantize(merged.dequantize(torch.float32))
    assert torch.equal(again.weight, merged.weight) and torch.equal(again.zero, merged.zero)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_whole_model_merges_into_codes(family: str) -> None:
    model, adapter = adapted(family)
    wanted = logits(model)
    folded = dict(adapter.merged_frozen())
    with adapter.detached():
        for name, module in folded.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        assert (logits(model) - wanted).norm() <= 1e-5 * wanted.norm()
        bits_now = sum(8 * m.bytes() for m in folded.values())
        assert bits_now <= 1.3 * sum(8 * module.base.bytes() for module in adapter.adapted.values())


def test_a_merged_model_is_saved_in_its_codes_and_loads(tmp_path: Path) -> None:
    import transformers

    from finetune.model.config import ModelConfig
    from finetune.model.load import load

    make("llama").save_pretrained(tmp_path / "dense")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="a")
    tokenizer.save_pretrained(tmp_path / "dense")
    fused = {"fused": "off"}
    loaded = load(ModelConfig(path=str(tmp_path / "dense"), **fused), BASES["int4"], torch.float32, "cpu")
    adapter = attach(loaded.model, QALoRAConfig(rank=4))
    randomize(adapter)
    wanted = logits(loaded.model)
    folded = dict(adapter.merged_frozen())
    adapter.unmount()
    for name, module in folded.items():
        loaded.model.set_submodule(name, module)
    loaded.model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again = load(ModelConfig(path=str(tmp_path / "merged"), **fused), KeepConfig(), torch.float32, "cpu")
    assert (logits(again.model) - wanted).norm() <= 1e-5 * wanted.norm()
    module = again.model.get_submodule("model.layers.0.mlp.down_proj")
    assert module.zeros == "real" and torch.equal(module.weight, folded["model.layers.0.mlp.down_proj"].weight)


def test_saved_and_loaded_but_never_as_a_lora(tmp_path: Path) -> None:
    model, adapter = adapted("mixtral")
    adapter.save(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert saved["finetune_method"] == "qa_lora" and "peft_type" not in saved
    other = stored("mixtral")
    attach(other, QALoRAConfig(path=str(tmp_path / "ours")))
    assert torch.equal(bits(logits(other)), bits(logits(model)))
    with pytest.raises(ModelError, match=r"is of method qa_lora: expected LORA"):
        attach(stored("mixtral"), LoRAConfig(path=str(tmp_path / "ours")))
    attach(stored("llama"), LoRAConfig(rank=4)).save(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"is of method LORA: expected qa_lora"):
        attach(stored("llama"), QALoRAConfig(path=str(tmp_path / "lora")))
    adapted("llama")[1].save(tmp_path / "groups")
    with pytest.raises(ModelError, match=r"lora_A.weight is 4 x 2, expected 4 x 1"):
        attach(stored("llama", "int3"), QALoRAConfig(path=str(tmp_path / "groups")))
    with pytest.raises(ConfigError, match=r"peft cannot be written of adapter=qa_lora: PEFT has no such method"):
        check_exports(["peft"], adapter)
    check_exports(["safetensors", "bnb-nf4"], adapter)


def test_other_bases_are_refused_before_and_after_loading() -> None:
    expected = r"set quant=int2 \| int3 \| int4 \| int8g"
    for config in (NF4Config(), Int8Config()):
        with pytest.raises(ConfigError, match=rf"needs a base stored in groups, not quant={config.name}: {expected}"):
            QALoRAConfig().check_base(config)
    for config in (KeepConfig(), *BASES.values()):
        QALoRAConfig().check_base(config)
    for quant in ("dense", "nf4", "int8"):
        before = list(frozen("llama", quant).state_dict())
        model = frozen("llama", quant)
        with pytest.raises(ConfigError, match=rf"needs a base stored in groups, and .*q_proj is not: {expected}"):
            attach(model, QALoRAConfig())
        assert list(model.state_dict()) == before


def test_what_a_base_keeps_in_floating_point_is_left_out_unless_it_is_named() -> None:
    model = stored("llama")
    dense = make("llama")
    model.set_submodule("model.layers.0.mlp.down_proj", dense.get_submodule("model.layers.0.mlp.down_proj"))
    adapter = attach(model, QALoRAConfig(rank=2))
    assert len(adapter.projections) == 13
    assert adapter.note == (
        "adapter=qa_lora leaves out model.layers.0.mlp.down_proj, which the base keeps in floating point"
    )
    adapter.unmount()
    with pytest.raises(ConfigError, match=r"and model\.layers\.0\.mlp\.down_proj is not: set quant="):
        attach(model, QALoRAConfig(targets=["down_proj"]))


def test_without_weights_it_fits_and_a_rank_above_the_groups_is_said() -> None:
    with torch.device("meta"):
        attach(make("llama"), QALoRAConfig())
    _, adapter = adapted("llama", rank=8)
    assert adapter.note == (
        "adapter=qa_lora: rank 8 is above the 2 pooled inputs of model.layers.0.self_attn.q_proj: there the product"
        " has rank 2 at most"
    )
    _, adapter = adapted("llama", rank=2)
    assert not adapter.note


def test_in_bf16_and_through_dropout() -> None:
    model, adapter = adapted("llama", dropout=0.5, dtype="bf16")
    model.to(torch.bfloat16).train()
    one, two = (model(ids(), use_cache=False).logits for _ in range(2))
    assert not torch.equal(one, two) and one.dtype == torch.bfloat16
    one.float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.abs().max() > 0 for p in adapter.trainable().values())


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
