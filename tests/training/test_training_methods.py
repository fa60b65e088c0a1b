"""Every adapter through the loop: resumed bit for bit, and with a learning rate of its own for some tensors."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import training_setup as setup
from test_training_resume import SETTINGS, Stop, StopAt, assert_same_run

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter
from finetune.quant.affine import Int4Config
from finetune.quant.freeze import freeze
from finetune.structure import inspect
from finetune.training.config import OPTIMIZERS, TrainConfig
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.optimizers.parameter_groups import SCALE, grouped

PARTS = [{"name": "lora", "rank": 4, "dropout": 0.2}, {"name": "ia3"}, {"name": "houlsby", "width": 4}]
FOR_TINY = {"rank": 4, "dropout": 0.2, "bias": "all", "parts": PARTS, "layers": [0, -1]}
"""What methods are set to for a model of width 16 without biases, which is no emulator."""

STORED = {"qa_lora": Int4Config(group_size=32), "qat_scales": Int4Config(group_size=32)}
"""Methods that want a certain storage."""
UNFIT = {"qat": ("dropout",)}
"""Settings that a method refuses."""


def adapted(method: str, model: torch.nn.Module) -> Adapter:
    config_type = ADAPTERS.type_of(method)
    known = {field.name for field in fields(config_type)}
    if method in STORED:
        freeze(model, STORED[method], inspect(model))
    torch.manual_seed(0)
    settings = {key: value for key, value in FOR_TINY.items() if key in known and key not in UNFIT.get(method, ())}
    return attach(model, config_type(**settings))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("method", ADAPTERS.types())
def test_every_method_resumes_bit_for_bit(tmp_path: Path, method: str, optim: str) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "dropout"}
    settings |= {"optim": OPTIMIZERS.type_of(optim)(), "max_steps": 8, "adapt": lambda model: adapted(method, model)}
    whole_run, whole = setup.run_training(tmp_path / "whole", **settings, tracker=StopAt(-1))
    with pytest.raises(Stop):
        setup.run_training(tmp_path / "parts", **settings, tracker=StopAt(5))
    _, parts = setup.run_training(tmp_path / "parts", **settings, tracker=StopAt(-1))
    assert whole_run.best_eval < whole_run.first_eval
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("optim", OPTIMIZERS.types())
def test_a_scaled_tensor_takes_adams_first_step_at_its_own_rate(optim: str) -> None:
    slow, fast = (torch.nn.Parameter(torch.zeros(5000)) for _ in range(2))
    groups = grouped({"slow": slow, "fast": fast}, {"fast": 8.0})
    optimizer, _ = OPTIMIZERS.build(OPTIMIZERS.type_of(optim)(), groups, TrainConfig(), torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group.get(SCALE, 1.0)
    slow.grad, fast.grad = torch.ones(5000), torch.ones(5000)
    optimizer.step()
    assert torch.allclose(slow, torch.tensor(-1e-3), rtol=1e-2)
    assert torch.allclose(fast, torch.tensor(-8e-3), rtol=1e-2)


def test_the_loop_scales_what_the_adapter_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, scaled = (tmp_path / name for name in ("plain", "scaled"))
    settings = {"max_steps": 1, "warmup_ratio": 0.0, "schedule": "constant", "max_grad_norm": None}
    _, before = setup.run_training(plain, **settings, optim=AdamWConfig())
    scales = {name: 4.0 for name in before if "q_proj" in name}
    monkeypatch.setattr(setup.HandMade, "learning_rate_scales", lambda self: scales)
    _, after = setup.run_training(scaled, **settings, optim=AdamWConfig())
    for name in before:
        assert torch.allclose(after[name], before[name] * scales.get(name, 1.0), rtol=1e-4, atol=1e-8)


def test_groups() -> None:
    one, two = torch.zeros(1), torch.zeros(1)
    assert grouped({"a": one, "b": two}, {}) == [one, two] == grouped({"a": one, "b": two}, {"a": 1.0})
    with pytest.raises(KeyError, match="scaled for c, which does not train"):
        grouped({"a": one}, {"c": 2.0})
