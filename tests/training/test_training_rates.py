"""Whose learning rate a run takes: the one that is set, else the method's own; and what learns at another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, AdapterConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.lora_plus import LoRAPlusConfig
from finetune.adapters.norm_tuning import NormTuningConfig
from finetune.adapters.prefix import PrefixConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.adapters.rates import whole_scales
from finetune.adapters.stack import StackConfig
from finetune.errors import ConfigError
from finetune.training.config import TrainConfig
from finetune.training.schedule import peak

CONF = Path(__file__).parents[2] / "conf"


def tiny(family: str, **sizes: int) -> torch.nn.Module:
    given: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
        "pad_token_id": 0,
    }  # fmt: skip
    if family == "llama":
        model: torch.nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**given | sizes))
    else:
        model = AutoModelForSequenceClassification.from_config(BertConfig(**given | sizes))
    return model


def learner(config: AdapterConfig, hidden: int | None = 256, head: tuple[str, ...] = ()) -> Any:
    text = SimpleNamespace(hidden_size=hidden) if hidden else SimpleNamespace()
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    return SimpleNamespace(config=config, model=model, task_head=head)


@pytest.mark.parametrize(
    ("set_to", "hidden", "expected"),
    [(None, 256, 2e-3), (None, 128, 2e-3), (None, 4096, 1.25e-4), (None, None, 2e-3), (3e-4, 4096, 3e-4)],
)
def test_the_peak(set_to: float | None, hidden: int | None, expected: float) -> None:
    method = LoRAConfig(learning_rate=2e-3)
    assert peak(TrainConfig(learning_rate=set_to), learner(method, hidden)) == pytest.approx(expected)


def test_what_is_a_share_of_the_base_is_so_on_every_width() -> None:
    assert peak(TrainConfig(), learner(PromptTuningConfig(learning_rate=0.2), 4096)) == 0.2


def test_virtual_tokens_learn_at_a_quarter_beside_a_head_made_for_the_task() -> None:
    tokens, weights = PromptTuningConfig(learning_rate=0.2), LoRAConfig(learning_rate=2e-3)
    assert peak(TrainConfig(), learner(tokens, head=("classifier",))) == 0.05
    assert peak(TrainConfig(), learner(weights, head=("classifier",))) == 2e-3
    assert peak(TrainConfig(learning_rate=0.3), learner(tokens, head=("classifier",))) == 0.3


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (LoRAConfig(rank=2), 1.0),
        (LoRAPlusConfig(rank=2), 1.0),
        (IA3Config(), 2e-3 / IA3Config().learning_rate),
        (PromptTuningConfig(), 2e-3 / PromptTuningConfig().learning_rate),
        (NormTuningConfig(), 2e-3 / NormTuningConfig().learning_rate),
    ],
)
def test_whole_modules_learn_no_faster_than_weights_of_a_base_may(config: AdapterConfig, share: float) -> None:
    config.train_also = ["lm_head"]
    adapter = attach(tiny("llama"), config)
    assert whole_scales(adapter) == {"lm_head.trained.weight": pytest.approx(share)}


def test_parts_of_a_stack_learn_as_they_do_alone() -> None:
    """On a wide base beside a head: weights fall with the width, virtual tokens with the head alone, whole modules in
    whichever part with the width."""
    parts: list[Any] = [LoRAConfig(rank=2), PrefixConfig(reparametrise=False, train_also=["word_embeddings"])]
    stack = attach(tiny("bert", hidden_size=512), StackConfig(parts=parts, learning_rate=1e-3))
    rate, scales = peak(TrainConfig(), stack), stack.learning_rate_scales()
    lora, prefix = LoRAConfig.learning_rate / 2 / 2, PrefixConfig.learning_rate / 4 / 2
    found = {name: rate * scale for name, scale in scales.items()}
    assert {round(found[name], 12) for name in found if "lora_A" in name} == {round(lora, 12)}
    own = stack.members["prefix"].learning_rate_scales()["prompt_encoder.values"]
    assert found["prompt_encoder.values"] == pytest.approx(prefix * own)
    words = next(name for name in found if name.endswith("word_embeddings.trained.weight"))
    assert found[words] == pytest.approx(min(prefix, lora))


@pytest.mark.parametrize("method", sorted(ADAPTERS.types()))
def test_yaml_and_dataclass_say_the_same(method: str) -> None:
    said = yaml.safe_load((CONF / "adapter" / f"{method}.yaml").read_text("utf-8"))["learning_rate"]
    assert float(said) == ADAPTERS.type_of(method)().learning_rate


def test_the_quickstart_learns_at_its_old_rate() -> None:
    assert LoRAConfig().learning_rate == 2e-3
    assert yaml.safe_load((CONF / "train" / "default.yaml").read_text("utf-8"))["learning_rate"] is None
    with pytest.raises(ConfigError, match=r"adapter\.learning_rate is 0\.0: expected more than 0"):
        LoRAConfig(learning_rate=0.0)
