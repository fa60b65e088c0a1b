"""Magnitude, Wanda and SparseGPT on the embedded base, and what a LoRA step on a pruned base costs.

`python scripts/bench_pruning.py`: the model is pruned in memory, block by block, calibrated on the training half of the
standard library's documentation and measured on the half that the base never saw; what stays is left dense, or stored
as int4 in groups of 64 (codes by GPTQ, and by SparseGPT's own sweep). Then the processor time of a LoRA step of 1024
tokens on the base pruned 2:4 by magnitude, where zeros are kept and where they are not, in turns. Writes
benchmarks/results/pruning.json and the table of docs/pruning.md; what is in the file already is kept.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "pruning.json", tables.DOCS / "pruning.md"
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = (None, "2:4", "4:8")
STORED = ("none", "int4")
PIECES, EVAL, LENGTH = 24, 12, 256
ROWS, STEPS = 4, 7


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", action="store_true", help="measure the steps anew")
    told = arguments.parse_args()
    document = tables.read_all(RESULT)
    done = {(row["quant"], row["pattern"], row["pruner"]) for row in document["rows"]}
    cells = [(quant, pattern, name) for quant in STORED for pattern in PATTERNS for name in METHODS]
    if missing := [cell for cell in cells if cell not in done]:
        prune(document, missing)
    tables.put(PAGE, "bench_pruning", made(document["rows"]))
    if told.steps or "steps" not in document:
        document["steps"] = {dtype: steps(dtype) for dtype in ("fp32", "bf16")}
        tables.write(RESULT, **document)


def prune(document: dict[str, Any], cells: list[tuple[str, str | None, str]]) -> None:
    """Add the rows of some cells of the table."""
    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.affine import Int4Config
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quant.pruners.base import PRUNERS
    from finetune.quant.recipe import Recipe
    from finetune.quant.rounders.gptq import GPTQ
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.pruning import sparsity
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    base = ModelConfig(path="embedded", fused="off")
    model, tokenizer = ft.load(base, DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, Int4Config())
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration)
    kinds: dict[str, Any] = PRUNERS.types()
    storage: dict[str, Any] = {"none": DenseConfig(), "int4": Int4Config()}
    for quant, pattern, name in cells:
        twin, pruner = copy.deepcopy(model), PRUNERS.build(kinds[name](pattern=pattern))
        structure = inspect(twin)
        layers = Driver(twin, structure, Recipe(storage[quant], GPTQ(), pruner=pruner), batches).go()
        error = sum(layer.error for layer in layers) / len(layers)
        reached = sparsity(layers, structure)
        row = {"quant": quant, "pattern": pattern, "pruner": name, "sparsity": reached, "mean_layer_error": error}
        row |= reference.compare(twin)
        print(f"{quant:<5} {pattern or '50 %':<5} {name:<10} KL {row['kl_mean']:.5f}", flush=True)
        document |= {"pieces": PIECES, "length": LENGTH, "eval_tokens": row["tokens"]}
        document["rows"].append(row)
        tables.write(RESULT, **document)


def steps(dtype: str) -> dict[str, float]:
    """Processor time of a LoRA step whose base keeps its zeros, over that of one whose base does not; medians."""
    kept, free = step_of(dtype, said=True), step_of(dtype, said=False)
    pairs = [(kept(), free()) for _ in range(STEPS + 2)][2:]
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    ratio = statistics.median(mine / plain for mine, plain in pairs)
    print(f"LoRA step {dtype}: {ratio:.2f} of the one without a mask", flush=True)
    return {"kept_s": seconds[0], "free_s": seconds[1], "ratio": ratio, "tokens": ROWS * LENGTH, "steps": STEPS}


def step_of(dtype: str, *, said: bool) -> Callable[[], float]:
    """Does a step of LoRA on the base pruned 2:4 by magnitude, and gives back its seconds.

    Args:
        said: whether the configuration says that the base was pruned.
    """
    import torch

    import finetune as ft
    from finetune.quant.base import FrozenLinear
    from finetune.quant.dense import DenseConfig
    from finetune.quant.pruners.base import keep_of_groups

    model, _ = ft.load("embedded", DenseConfig(), dtype=dtype, device="cpu")
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            w_OI = module.dequantize(torch.float32)
            module.store(w_OI * keep_of_groups(w_OI.abs(), (2, 4)))
    if said:
        model.config.pruning = {"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}
    adapter = ft.attach(model, ft.LoRAConfig(rank=16))
    model.train()
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=1e-3)
    ids = torch.randint(3, 4000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        begun = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begun

    return step


def made(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    found = {(row["quant"], row["pattern"], row["pruner"]): row for row in rows}
    lines = ["| stored | zeros | " + " | ".join(METHODS) + " |", "| --- | --- |" + " --- |" * len(METHODS)]
    for quant in STORED:
        for pattern in PATTERNS:
            cells = [f"{found[quant, pattern, name]['kl_mean']:.3f}" for name in METHODS]
            lines.append(
                f"| {'dense' if quant == 'none' else quant} | {pattern or '50 %'} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
