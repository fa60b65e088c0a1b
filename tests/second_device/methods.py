"""Train methods on a base that lies on the second device: `python methods.py LIBRARY DIRECTORY QUANT METHOD...`.

Prints a line a method: its name, and what was measured on its way on the second device and on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from device import DEVICE, install

ROOT = Path(__file__).parents[2]


def measured(base: str, quant: str, method: str, device: str, rows: Path, run: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of two steps of training, and losses on held-out rows before and after them."""
    import finetune as ft
    from finetune.adapters.base import ADAPTERS
    from finetune.quant.base import QUANTIZERS

    torch.manual_seed(0)
    # The second device has neither fused parts nor torch's fused attention: the CPU goes without, for the same sums.
    config = ft.ModelConfig(path=base, attention="eager", fused="off")
    model, tokenizer = ft.load(config, quant=QUANTIZERS.type_of(quant)(), dtype="fp32", device=device)
    adapter = ft.attach(model, ADAPTERS.type_of(method)())
    train = ft.TrainConfig(max_steps=2, batch_size=4, grad_accumulation=1, log_every=1)
    ft.train(model, tokenizer, data=str(rows), adapter=adapter, train=train, output_dir=run)
    kinds = {parameter.device.type for parameter in model.parameters()}
    assert kinds == {torch.device(device).type}, f"{method}: parameters on {sorted(kinds)}"
    ids = torch.arange(5, device=device)[None]
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "eval_loss")}


def main() -> None:
    """Each method on both devices."""
    library, folder, quant, *methods = sys.argv[1:]
    install(library)
    work = Path(folder)
    rows = work / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(400):
            print(json.dumps({"prompt": f"what is {number}?", "completion": f" it is {number * 3}"}), file=file)
    base = str(ROOT / "finetune" / "assets" / "tiny")
    for method in methods:
        there = measured(base, quant, method, DEVICE, rows, work / f"{method}-there")
        here = measured(base, quant, method, "cpu", rows, work / f"{method}-here")
        print(json.dumps({"method": method, "there": there, "here": here}), flush=True)


if __name__ == "__main__":
    main()
