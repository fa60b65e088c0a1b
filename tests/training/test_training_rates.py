"""Whose learning rate a run takes: the one that is set, else the method's own, less for wider bases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.errors import ConfigError
from finetune.training.config import TrainConfig
from finetune.training.schedule import peak

CONF = Path(__file__).parents[2] / "conf"


def base(hidden: int | None) -> SimpleNamespace:
    text = SimpleNamespace(hidden_size=hidden) if hidden else SimpleNamespace()
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(
    ("set_to", "hidden", "expected"),
    [(None, 256, 2e-3), (None, 128, 2e-3), (None, 4096, 1.25e-4), (None, None, 2e-3), (3e-4, 4096, 3e-4)],
)
def test_the_peak(set_to: float | None, hidden: int | None, expected: float) -> None:
    method = LoRAConfig(learning_rate=2e-3)
    assert peak(TrainConfig(learning_rate=set_to), method, base(hidden)) == pytest.approx(expected)


def test_what_is_a_share_of_the_base_is_so_on_every_width() -> None:
    assert peak(TrainConfig(), PromptTuningConfig(learning_rate=0.2), base(4096)) == 0.2


@pytest.mark.parametrize("method", sorted(ADAPTERS.types()))
def test_yaml_and_dataclass_say_the_same(method: str) -> None:
    said = yaml.safe_load((CONF / "adapter" / f"{method}.yaml").read_text("utf-8"))["learning_rate"]
    assert float(said) == ADAPTERS.type_of(method)().learning_rate


def test_the_quickstart_learns_at_its_old_rate() -> None:
    assert LoRAConfig().learning_rate == 2e-3
    assert yaml.safe_load((CONF / "train" / "default.yaml").read_text("utf-8"))["learning_rate"] is None
    with pytest.raises(ConfigError, match=r"adapter\.learning_rate is 0\.0: expected more than 0"):
        LoRAConfig(learning_rate=0.0)
