"""W8A8 on models that grew up with outliers: naive rounding, LLM.int8() and SmoothQuant's O1, O2 and O3.

`python scripts/bench_outlier_seeded.py`: a byte-level Llama of three small layers is trained on the training half of
the standard library's documentation. Two channels of each of its norms start at a gain of 40 and 25 and are never
trained, so that its weights grow around outliers: unlike scripts/bench_w8a8.py, nothing here is the inverse of
smoothing. Then it is quantized in memory and measured on the half that it never saw, in perplexity of a byte and KL
from the dense model; three seeds, a minute or two each on one core.

Writes benchmarks/results/w8a8_seeded.json and the table of docs/quantization.md; seeds already in the file are kept, so
an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "w8a8_seeded.json", tables.DOCS / "quantization.md"
SEEDS, GAINS = (0, 1, 2), (40.0, 25.0)
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
STEPS, ROWS, LENGTH, RATE = 600, 16, 128, 3e-3
PIECES, EVAL = 32, 157
TENSOR = {"weights": "tensor", "activations": "tensor"}
ALPHA = 0.5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="those of this run; side by side is fine"
    )
    import torch

    torch.set_num_threads(1)
    train, held_out = text("train"), text("eval")
    for seed in arguments.parse_args().seeds:
        if any(row["seed"] == seed for row in tables.read(RESULT)):
            continue
        begun = time.process_time()
        model = grown(seed, train)
        seconds = round(time.process_time() - begun)
        new = [{"seed": seed, "train_cpu_seconds": seconds, **row} for row in measured(model, train, held_out)]
        rows = sorted([*tables.read(RESULT), *new], key=lambda row: row["seed"])
        facts = {"steps": STEPS, "gains": GAINS, "model": SIZES, "alpha": ALPHA, "eval_tokens": rows[0]["tokens"]}
        tables.write(RESULT, **facts, rows=rows)
    if {row["seed"] for row in tables.read(RESULT)} >= set(SEEDS):
        tables.put(PAGE, "bench_outlier_seeded", made(tables.read(RESULT)))


def text(split: Any) -> Any:
    """One side of the documentation as bytes, int64 [rows, LENGTH]."""
    import torch

    from finetune.data.pydocs import pydocs_rows

    said = "\n\n".join(message["content"] for row in pydocs_rows(split) for message in row["messages"])
    found = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8).long()
    return found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)


def grown(seed: int, train: Any) -> Any:
    """A model trained with two gains of each norm held where they are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))
    channels = torch.randperm(SIZES["hidden_size"])[: len(GAINS)]
    free = torch.ones(SIZES["hidden_size"])
    free[channels] = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data[channels] = torch.tensor(GAINS)
            parameter.register_hook(lambda grad: grad * free)
        else:
            assert name.endswith("weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        ids = train[torch.randint(len(train), (ROWS,))]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == STEPS - 1:
            print(f"seed {seed} step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval().requires_grad_(False)


def measured(model: Any, train: Any, held_out: Any) -> list[dict[str, Any]]:
    """One row a method."""
    from finetune.quant.driver import Driver
    from finetune.quant.int8_storage import Int8Config
    from finetune.quant.recipe import Recipe
    from finetune.quant.transforms.smoothquant import SmoothQuant, SmoothQuantConfig
    from finetune.quant.w8a8 import W8A8Config
    from finetune.quantize.measure import Remembered, Tokens
    from finetune.quantize.text import batches_of, measured_on
    from finetune.structure import inspect

    methods: dict[str, tuple[Any, bool]] = {
        "naive (tensor, tensor)": (W8A8Config(**TENSOR), False),
        "naive (tensor, static)": (W8A8Config(**TENSOR, static=True), False),
        "W8A8 channel, token": (W8A8Config(), False),
        "LLM.int8()": (Int8Config(), False),
        "SmoothQuant O1": (W8A8Config(weights="tensor"), True),
        "SmoothQuant O2": (W8A8Config(**TENSOR), True),
        "SmoothQuant O3": (W8A8Config(**TENSOR, static=True), True),
    }
    width = SIZES["vocab_size"]
    # One row at a time, as published: rows of one call share a scale where inputs have one a tensor.
    alone = [row for piece in held_out[:EVAL] for row in measured_on([piece], width)]
    reference = Remembered(model, alone, Tokens(width))
    batches = batches_of(list(train[:: len(train) // PIECES][:PIECES]))
    rows = []
    for name, (quant, smooth) in methods.items():
        twin = copy.deepcopy(model)
        transform = SmoothQuant(SmoothQuantConfig(alpha=ALPHA)) if smooth else None
        Driver(twin, inspect(twin), Recipe(quant, transform=transform), batches).go()
        rows.append({"method": name, **reference.compare(twin)})
        print(f"{name:<24} perplexity {rows[-1]['perplexity']:.4f} KL {rows[-1]['kl_mean']:.5f}", flush=True)
    return rows


def made(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    found = {(row["seed"], row["method"]): row for row in rows}
    lines = ["| perplexity of a byte (KL) | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |"]
    lines.append("| --- |" + " --- |" * len(SEEDS))
    dense = [next(row["perplexity_dense"] for row in rows if row["seed"] == seed) for seed in SEEDS]
    lines.append(f"| dense | {' | '.join(f'{value:.3f}' for value in dense)} |")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [found[seed, method] for seed in SEEDS]
        lines.append(f"| {method} | " + " | ".join(f"{c['perplexity']:.3f} ({c['kl_mean']:.4f})" for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
