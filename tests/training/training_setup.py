"""A run small enough for tests: a random Llama of two blocks, part of which trains, on random rows.

Also a program, so that tests can run it in processes of their own: `training_setup.py DIRECTORY key=value ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.adapters.base import Adapter, AdapterConfig
from finetune.data.rows import Row, TokenRows
from finetune.device import make_accelerator
from finetune.training.config import TrainConfig
from finetune.training.loop import train
from finetune.training.objectives.sft import SFTConfig, build
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.protocols import TrainResult
from finetune.training.run_directory import RunDirectory, shared_run
from finetune.training.trackers.off import Off

VOCAB = 61


def tiny_model(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    model.lm_head.weight.mul_(20)  # so that something can be said with it
    return model


class Delta(nn.Module):
    """A linear layer with a dense trained difference; stands for any adapter."""

    def __init__(self, base: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.dropout(x) @ self.delta.to(x.dtype).T if self.on else y


class HandMade(Adapter):
    """Deltas on the query and down projections."""

    def __init__(self, model: nn.Module, dropout: float = 0.0) -> None:
        self.model, self.config = model, AdapterConfig()
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "down_proj")):
                model.set_submodule(name, Delta(module, dropout))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        deltas = [module for module in self.model.modules() if isinstance(module, Delta)]
        for module in deltas:
            module.on = False
        yield
        for module in deltas:
            module.on = True

    def mount(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        raise NotImplementedError

    @property
    def mergeable(self) -> bool:
        return False

    def merged(self) -> Iterator[Any]:
        return iter(())

    def save(self, directory: Path) -> None:
        raise NotImplementedError

    def load(self, directory: Path) -> None:
        raise NotImplementedError


def rows(count: int = 40, seed: int = 0, shortest: int = 4, longest: int = 14) -> TokenRows:
    """Rows of different lengths that can be learnt: each token is followed by its double."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = [int(draw.integers(3, VOCAB))]
        for _ in range(int(draw.integers(shortest, longest)) - 2):
            ids.append(max(3, ids[-1] * 2 % VOCAB))
        array = np.array([*ids, 2], np.int32)
        labels = array.copy()
        labels[: int(draw.integers(1, 3))] = -100
        made.append(Row(array, labels))
    return TokenRows.of(made)


def run_training(
    directory: Path,
    *,
    train_rows: TokenRows | None = None,
    eval_rows: TokenRows | None = None,
    dropout: float = 0.0,
    packing: bool = False,
    seed: int = 0,
    accelerator: Any = None,
    model: nn.Module | None = None,
    objective: Any = None,
    optim: Any = None,
    tracker: Any = None,
    adapt: Callable[[nn.Module], Adapter] | None = None,
    **settings: Any,
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """Start or resume a run; its result and the trained tensors."""
    accelerator = accelerator or make_accelerator("cpu")
    model = model if model is not None else tiny_model()
    adapter = HandMade(model, dropout) if adapt is None else adapt(model)
    config = TrainConfig(**{"dtype": "fp32", "learning_rate": 1e-2, "log_every": 1, "batch_size": 4, **settings})

    def open_run() -> RunDirectory:
        if (directory / "run.json").exists():
            return RunDirectory.resume(directory)
        return RunDirectory.create("test", directory)

    with shared_run(accelerator, open_run) as run:
        result = train(
            model,
            adapter,
            rows() if train_rows is None else train_rows,
            rows(9, seed=1) if eval_rows is None else eval_rows,
            objective=objective or build(SFTConfig(), model),
            config=config,
            optim=optim or AdamWConfig(),
            run=run,
            tracker=tracker or Off(),
            accelerator=accelerator,
            pad_id=0,
            packing=packing,
            max_length=32,
            seed=seed,
        )
    return result, {name: p.detach().clone() for name, p in adapter.trainable().items()}


def main() -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    settings = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in sys.argv[2:])}
    result, tensors = run_training(directory, **settings)
    if int(__import__("os").environ.get("RANK", "0")) == 0:
        save_file(tensors, directory / "final.safetensors")
    print("status", result.status)


if __name__ == "__main__":
    main()
