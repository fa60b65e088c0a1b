"""Train, resume, evaluate, answer, calibrate and merge on the second device: `python whole_run.py LIBRARY DIRECTORY`.

Prints what it did.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from device import DEVICE, install


def rows(tokenizer: Any) -> Any:
    from finetune.data.rows import Row, TokenRows

    draw = np.random.default_rng(0)
    ids = [np.append(draw.integers(5, 3000, n), tokenizer.eos_token_id).astype(np.int32) for n in (20, 33, 17, 40, 25)]
    return TokenRows.of([Row(row, row) for row in ids])


def main() -> None:
    import finetune as ft
    from finetune.evaluation import predictions
    from finetune.export.calibration import Calibration
    from finetune.export.verify import Panel
    from finetune.samples import answer
    from finetune.training.config import TrainConfig
    from finetune.training.loop import train
    from finetune.training.objectives.sft import SFTConfig, build
    from finetune.training.optimizers.adamw import AdamWConfig
    from finetune.training.preflight import preflight
    from finetune.training.run_directory import RunDirectory, shared_run
    from finetune.training.trackers.off import Off

    torch.set_num_threads(1)
    install(sys.argv[1])
    directory = Path(sys.argv[2])
    try:
        torch.ones(2, device=DEVICE) + torch.ones(2)
    except RuntimeError as error:
        print("refused", "same device" in str(error))
    model, tokenizer = ft.load("embedded", quant=ft.NF4Config(), dtype="fp32", device=DEVICE)
    adapter = ft.attach(model, ft.LoRAConfig(rank=4, dropout=0.1))
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device(DEVICE))
    learnt = rows(tokenizer)
    objective = build(SFTConfig(), model)

    def run(steps: int) -> Any:
        config = TrainConfig(dtype="fp32", max_steps=steps, batch_size=2, grad_accumulation=2, save_every=2)
        start = RunDirectory.resume if (directory / "run.json").exists() else None
        with shared_run(accelerator, lambda: start(directory) if start else RunDirectory.create("t", directory)) as at:
            common: dict[str, Any] = {"objective": objective, "config": config, "optim": AdamWConfig(), "run": at}
            common |= {"tracker": Off(), "accelerator": accelerator, "pad_id": 0, "packing": True}
            return train(model, adapter, learnt, learnt, max_length=64, seed=0, **common)

    settings: dict[str, Any] = {"objective": objective, "tokenizer": tokenizer, "config": TrainConfig(dtype="fp32")}
    settings |= {"accelerator": accelerator, "pad_id": 0, "packing": True}
    print("preflight", len(preflight(model, adapter, learnt, **settings)))
    first, second = run(2), run(4)
    print("trained", first.steps, second.steps, second.last_eval < first.first_eval)
    print("answered", len(answer(model, tokenizer, [[5, 6, 7], [8, 9]], 4)))
    print("predicted", len(list(predictions(model, Panel.of(learnt, 4, 4096, 0).batches(), DEVICE))))
    name = "model.layers.0.self_attn.q_proj"
    gram = Calibration(model, [name], learnt, 0).gram(name)
    print("calibrated", None if gram is None else gram.device.type)
    base = model.get_submodule(name).base
    print("requantized", base.requantize(base.dequantize(torch.float32)).weight.device.type)
    print("merged", {weight.device.type for _, weight in adapter.merged()})
    adapter.save(directory / "adapter")


if __name__ == "__main__":
    main()
