"""Train methods on a base that lies on the second device: `python methods.py LIBRARY DIRECTORY QUANT METHOD...`.

Prints a line a method: its name, and the losses of its steps on the second device and on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from device import DEVICE, install

ROOT = Path(__file__).parents[2]


def losses(base: str, quant: str, method: str, device: str, rows: Path, run: Path) -> list[float]:
    """Of two steps of training, and of evaluating."""
    import finetune as ft
    from finetune.adapters.base import ADAPTERS
    from finetune.quant.base import QUANTIZERS

    torch.manual_seed(0)
    model, tokenizer = ft.load(base, quant=QUANTIZERS.type_of(quant)(), dtype="fp32", device=device)
    adapter = ft.attach(model, ADAPTERS.type_of(method)())
    train = ft.TrainConfig(max_steps=2, batch_size=4, grad_accumulation=1, log_every=1)
    ft.train(model, tokenizer, data=str(rows), adapter=adapter, train=train, output_dir=run)
    kinds = {parameter.device.type for parameter in model.parameters()}
    assert kinds == {torch.device(device).type}, f"{method}: parameters on {sorted(kinds)}"
    ids = torch.arange(5, device=device)[None]
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def main() -> None:
    """Each method on both devices."""
    library, folder, quant, *methods = sys.argv[1:]
    install(library)
    work = Path(folder)
    rows = work / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(40):
            print(json.dumps({"prompt": f"what is {number}?", "completion": f" it is {number * 3}"}), file=file)
    base = str(ROOT / "finetune" / "assets" / "tiny")
    for method in methods:
        there = losses(base, quant, method, DEVICE, rows, work / f"{method}-there")
        here = losses(base, quant, method, "cpu", rows, work / f"{method}-here")
        print(json.dumps({"method": method, "there": there, "here": here}), flush=True)


if __name__ == "__main__":
    main()
