"""What a run keeps of a start that was found from the base's weights, so that it resumes on the very same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters_models import bits, ids, randomize
from omegaconf import OmegaConf

from finetune.adapters import residual_layers
from finetune.adapters.base import AdapterConfig
from finetune.adapters.loftq import LoftQConfig
from finetune.adapters.pissa import PiSSAConfig
from finetune.config import RunConfig
from finetune.data.config import DataConfig
from finetune.device import make_accelerator
from finetune.errors import ConfigError
from finetune.export.config import ExportConfig
from finetune.model.config import ModelConfig
from finetune.pipeline import Runner
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.nf4 import NF4Config
from finetune.training.config import TrainConfig
from finetune.training.objectives.sft import SFTConfig
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.run_directory import RunDirectory
from finetune.training.trackers.off import OffConfig

TARGETS = ["q_proj", "down_proj"]


def loaded(
    directory: RunDirectory, adapter: AdapterConfig, quant: QuantConfig, formats: tuple[str, ...] = ()
) -> Runner:
    """A run up to where its model is adapted."""
    config = RunConfig(
        name="start", seed=5, model=ModelConfig(path="embedded", fused="off"), quant=quant, adapter=adapter,
        train=TrainConfig(dtype="fp32"), data=DataConfig(train="rows.jsonl"), optim=AdamWConfig(),
        objective=SFTConfig(), tracking=OffConfig(), export=ExportConfig(formats=list(formats)),
    )  # fmt: skip
    runner = Runner(config, OmegaConf.create({}), make_accelerator("cpu"), directory)
    runner.load()
    return runner


@torch.no_grad()
def says(runner: Runner) -> torch.Tensor:
    return runner.loaded.model(ids()).logits


@pytest.mark.parametrize(
    ("adapter", "quant", "kept"),
    [
        (PiSSAConfig(rank=4, targets=TARGETS), NF4Config(), True),
        (PiSSAConfig(rank=4, targets=TARGETS), DenseConfig(), True),
        (LoftQConfig(rank=4, targets=TARGETS), NF4Config(), False),
    ],
    ids=["residual", "initial", "plain"],
)
def test_a_resumed_run_stands_on_the_start_that_was_kept(
    adapter: AdapterConfig, quant: QuantConfig, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory.create("start", str(tmp_path / "run")) as run:
        first = loaded(run, adapter, quant)
        start = says(first)
        trained = first.adapter.trainable()
        randomize(first.adapter)
        wanted = says(first)
    assert (tmp_path / "run" / "start").is_dir() == kept
    if kept:
        monkeypatch.setattr(residual_layers, "principal", None)  # nothing may be decomposed again
    with RunDirectory.resume(tmp_path / "run") as run:
        second = loaded(run, adapter, quant)
        assert torch.equal(bits(says(second)), bits(start))
        with torch.no_grad():
            for name, parameter in second.adapter.trainable().items():
                parameter.copy_(trained[name])
        assert torch.equal(bits(says(second)), bits(wanted))


def test_an_export_that_the_stored_base_rules_out_is_refused_before_training(tmp_path: Path) -> None:
    adapter = PiSSAConfig(rank=4, targets=TARGETS)
    with RunDirectory.create("start", str(tmp_path / "run")) as run:
        with pytest.raises(ConfigError, match=r"peft cannot be written of adapter=pissa"):
            loaded(run, adapter, NF4Config(), ("peft",))
        loaded(run, adapter, DenseConfig(), ("peft",))
