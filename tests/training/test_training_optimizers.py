"""Every optimizer takes Adam's step, or says what stands in for it."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import ConfigError
from finetune.training.config import OPTIMIZERS, TrainConfig
from finetune.training.optimizers import bitsandbytes_state
from finetune.training.optimizers.adamw import AdamWConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPTIMIZERS.types())
def test_follows_adamw(name: str) -> None:
    """20 steps on a quadratic: the 8-bit state costs a few per cent at most."""
    ends = []
    for config in (OPTIMIZERS.type_of(name)(weight_decay=0.1), AdamWConfig(weight_decay=0.1)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer, note = OPTIMIZERS.build(config, [weight], TrainConfig(learning_rate=0.05), CPU)
        assert note is None or (name in note and "takes its place" in note and "\n" not in note)
        for _ in range(20):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    assert (ends[0] - ends[1]).norm() < 0.1 * ends[1].norm()


def test_paged_state_needs_a_device_that_pages() -> None:
    reason = bitsandbytes_state.works_here("PagedAdamW8bit", CPU)
    assert reason == "cpu has no paged memory"
    optimizer, note = OPTIMIZERS.build(OPTIMIZERS.type_of("paged_adamw_8bit")(), [torch.zeros(1)], TrainConfig(), CPU)
    assert type(optimizer) is torch.optim.AdamW and "optim=paged_adamw_8bit" in note


def test_whatever_breaks_gives_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", None)
    _, note = OPTIMIZERS.build(OPTIMIZERS.type_of("adamw_8bit")(), [torch.zeros(1)], TrainConfig(), CPU)
    assert "TypeError" in note


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betas": [0.9]}, r"optim.betas is \[0.9\]: expected two numbers"),
        ({"betas": [0.9, 1.0]}, r"optim.betas"),
        ({"eps": 0.0}, r"optim.eps is 0.0: expected more than 0"),
        ({"weight_decay": -1.0}, r"optim.weight_decay is -1.0"),
    ],
)
def test_settings(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdamWConfig(**settings)
