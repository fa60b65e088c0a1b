"""Encoders and pairs of stacks: where adapters go in BERT, RoBERTa, T5, BART; their heads and shared embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, logits, make, pefts, randomize, task_of

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS
from finetune.adapters.houlsby import HoulsbyConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.pfeiffer import PfeifferConfig
from finetune.errors import ConfigError
from finetune.quant.dense import DenseLinear
from finetune.structure import inspect

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
PEFT_TASKS = {"SequenceClassification": "SEQ_CLS", "Seq2SeqLM": "SEQ_2_SEQ_LM"}
FAMILIES = ("bert", "roberta", "t5", "t5_gated", "bart")
HEADS = {"bert": ["classifier"], "roberta": ["classifier"]}

ENDS = {
    "bert": (["attention.output.dense"], ["output.dense"]),
    "roberta": (["attention.output.dense"], ["output.dense"]),
    "t5": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"]),
    "t5_gated": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"]),
    "bart": (["self_attn.out_proj", "encoder_attn.out_proj"], ["fc2"]),
}
"""Last projections of attention and of feed-forwards, as the papers and PEFT's own tables name them."""
KEYS = {"bert": ["key", "value"], "roberta": ["key", "value"], "t5": ["k", "v"], "t5_gated": ["k", "v"],
        "bart": ["k_proj", "v_proj"]}  # fmt: skip


def ending(names, leaves: list[str]) -> set[str]:
    return {name for name in names if any(name.endswith(f".{leaf}") for leaf in leaves)}


@pytest.mark.parametrize("family", FAMILIES)
def test_bottlenecks_and_factors_go_where_sub_layers_end(family: str) -> None:
    projections = [p.name for p in inspect(make(family)).projections]
    attention, feedforward = (ending(projections, leaves) for leaves in ENDS[family])
    feedforward -= attention
    after = {name.rpartition(".bottleneck")[0] for name in attach(frozen(family), HoulsbyConfig()).trainable()}
    assert after - {""} == attention | feedforward
    after = {name.rpartition(".bottleneck")[0] for name in attach(frozen(family), PfeifferConfig()).trainable()}
    assert after - {""} == feedforward
    scaled = {name.removesuffix(".ia3_l") for name in attach(frozen(family), IA3Config()).trainable()}
    assert ending(scaled, KEYS[family]) | feedforward == scaled - ending(scaled, ["weight", "bias"])
    assert len(attention) == len(ending(projections, KEYS[family])) / 2


@pytest.mark.parametrize("method", ["lora", "ia3", "dora", "norm_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_gives_our_logits(family: str, method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    quant = "nf4" if FAMILIES.index(family) % 2 else "dense"
    model = frozen(family, quant)
    adapter = attach(model, ADAPTERS.type_of(method)())
    randomize(adapter)
    adapter.save(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["modules_to_save"] or []) == HEADS.get(family, [])
    theirs = peft.PeftModel.from_pretrained(dense_twin(family, quant), str(tmp_path)).eval()
    mine = logits(model)
    with adapter.disabled():
        assert (mine - logits(model)).abs().max() > 0.01
    assert (logits(theirs) - mine).abs().max() <= BAR


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "bart"])
def test_what_peft_saves_by_its_own_tables_is_read(family: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    task = PEFT_TASKS[task_of(make(family))]
    theirs = pefts(dense_twin(family, "nf4"), getattr(peft, kind)(task_type=task), tmp_path)
    model = frozen(family, "nf4")
    config = {"LoraConfig": LoRAConfig, "IA3Config": IA3Config}[kind](path=str(tmp_path))
    adapter = attach(model, config)
    assert (logits(theirs) - logits(model)).abs().max() <= BAR
    assert bool(ending(adapter.trainable(), ["weight"])) or kind == "IA3Config"
    if kind == "IA3Config" and family == "t5":  # its table has what the flow of activations says
        targets = {name.removesuffix(".ia3_l") for name in adapter.trainable()}
        assert targets == {n.removesuffix(".ia3_l") for n in attach(frozen(family), IA3Config()).trainable()}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_weight_that_many_modules_share_trains_once_and_merges(family: str, tmp_path: Path) -> None:
    model = frozen(family, "nf4")
    structure = inspect(model)
    adapter = attach(model, LoRAConfig(rank=2, train_also=["lm_head", "embed_tokens", "shared"]))
    whole = [name for name in adapter.trainable() if ".trained." in name]
    assert len(whole) == 1
    before = logits(model)
    with torch.no_grad():
        adapter.trainable()[whole[0]].add_(0.1 * torch.randn(96, 64, generator=torch.Generator().manual_seed(1)))
    moved = logits(model)
    assert (moved - before).abs().max() > 0.01
    merged = dict(adapter.merged())
    assert {f"{name}.weight" for name in structure.ties} <= set(merged)
    assert len({merged[f"{name}.weight"].sum().item() for name in structure.ties}) == 1
    adapter.save(tmp_path)
    again = frozen(family, "nf4")
    attach(again, LoRAConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(again)), bits(moved))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(dense_twin(family, "nf4"), str(tmp_path)).eval()
    assert (logits(theirs) - moved).abs().max() <= BAR
    assert inspect(model) == structure


@pytest.mark.parametrize("named", [["lm_head"], ["shared"], ["encoder.embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_part_of_what_is_shared_is_refused(named: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is tied to .*: name all, \[lm_head, embed_tokens, shared\]") as raised:
        attach(frozen("t5"), LoRAConfig(train_also=named))
    assert "\n" not in str(raised.value)


def test_weights_that_t5_wants_in_floating_point_stay_so() -> None:
    """Its feed-forward casts its input to the dtype of `wo`: to uint8, were that packed."""
    model = frozen("t5", "nf4")
    kinds = {name.rpartition(".")[2]: type(model.get_submodule(name)) for name in
             (p.name for p in inspect(model).projections)}  # fmt: skip
    assert kinds.pop("wo") is DenseLinear
    assert DenseLinear not in kinds.values()
    assert (logits(model) - logits(dense_twin("t5", "nf4"))).abs().max() <= BAR
