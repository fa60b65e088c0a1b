"""A head made for the task learns by what it is given: its outputs move as far on every base."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.stack import StackConfig
from finetune.data.rows import Batch
from finetune.errors import ConfigError
from finetune.training.config import TrainConfig
from finetune.training.head_rate import head_scales

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {"llama": LlamaConfig(**SIZES), "bert": BertConfig(**SIZES)}
RATE = 1e-3


def classifier(family: str, grown: float = 1.0) -> torch.nn.Module:
    """A new head over a base; `grown` times as large are the features it is given."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family], dtype=torch.float32).eval()
    with torch.no_grad():
        if family == "llama":
            model.model.norm.weight.mul_(grown)
        else:
            model.made_new = ("bert.pooler",)
            model.bert.encoder.layer[-1].output.LayerNorm.weight.mul_(grown)
            model.bert.encoder.layer[-1].output.LayerNorm.bias.mul_(grown)
    return model


def batch() -> Batch:
    torch.manual_seed(5)
    ids = torch.randint(1, 97, (4, 9))
    return Batch(ids, torch.full_like(ids, -100), torch.arange(9).expand(4, -1), torch.ones_like(ids))


def scales(model: torch.nn.Module, parts: bool = False, **settings: float | None) -> dict[str, float]:
    adapter = attach(model, StackConfig() if parts else LoRAConfig(rank=2))
    return head_scales(TrainConfig(learning_rate=RATE, **settings), adapter, batch())


@pytest.mark.parametrize(("family", "first"), [("llama", "score.trained"), ("bert", "bert.pooler.trained.dense")])
def test_a_step_moves_the_outputs_as_far_as_asked(family: str, first: str) -> None:
    """The farthest a step can go, all inputs of the root mean square of theirs, is `head_step`."""
    seen = []
    model = classifier(family)
    adapter = attach(model, LoRAConfig(rank=2))
    found = head_scales(TrainConfig(learning_rate=RATE, head_step=0.5), adapter, batch())
    handle = model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch().model_inputs())
    handle.remove()
    size = float(seen[0].square().mean().sqrt())
    assert found[f"{first}.weight"] * RATE * 64 * size == pytest.approx(0.5, rel=1e-5)
    assert set(found) == {n for n in adapter.trainable() if "lora" not in n}, "every weight of the head"


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_times_the_features_a_tenth_of_the_rate(family: str) -> None:
    plain, grown = scales(classifier(family)), scales(classifier(family, 10.0))
    first = next(iter(plain))
    assert grown[first] == pytest.approx(plain[first] / 10, rel=1e-4)


def test_a_stack_has_one_head_and_null_leaves_it_alone() -> None:
    assert scales(classifier("llama"), parts=True) == scales(classifier("llama"))
    assert scales(classifier("llama"), head_step=None) == {}
    with pytest.raises(ConfigError, match=r"train\.head_step is 0: expected more than 0"):
        TrainConfig(head_step=0)


def test_the_model_is_left_as_it_was() -> None:
    model = classifier("bert").train()
    adapter, rows = attach(model, LoRAConfig(rank=2)), batch()
    before = torch.random.get_rng_state()
    head_scales(TrainConfig(learning_rate=RATE), adapter, rows)
    assert model.training and torch.equal(before, torch.random.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())
