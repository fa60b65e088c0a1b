"""ZeroQuant on the embedded base: groups of weights, rows of inputs, and distillation block by block.

`python scripts/bench_zeroquant.py`: the model is quantized in memory in W4A8 by row and in groups, and in int3 and
int2, by rounding to nearest and by GPTQ, each without and with layer-by-layer distillation (`distill.steps`), on the
same calibration text: the training half of the standard library's documentation. Measured on the half that the base
never saw: mean KL from the dense model and perplexity; the error of each block before and after is written down too.
Targets are those of the paper, what the dense block makes of the quantized model's hidden states
(`distill.targets=same`), or the dense model's own ("to the dense stream", `distill.targets=dense`).

Writes benchmarks/results/zeroquant.json and the table of docs/quantization.md; rows already in the file are kept, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "zeroquant.json", tables.DOCS / "quantization.md"
PIECES, EVAL, LENGTH = 16, 8, 256
STEPS = 50
FORMATS = {
    "W4A8 row": ("w4a8", {"group_size": -1}),
    "W4A8 g64": ("w4a8", {"group_size": 64}),
    "int3 g64": ("int3", {"group_size": 64}),
    "int2 g64": ("int2", {"group_size": 64}),
}
WAYS = (
    "RTN",
    "RTN, distilled",
    "RTN, distilled to the dense stream",
    "GPTQ",
    "GPTQ, distilled",
    "GPTQ, distilled slowly",
    "GPTQ, distilled slowly to the dense stream",
)
SLOWLY = 0.003
"""The learning rate of those, that of the others being the default."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of this run, beside others")
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="the same")
    asked = arguments.parse_args()

    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.base import QUANTIZERS
    from finetune.quant.dense import DenseConfig
    from finetune.quant.distill import DistillConfig, Distiller
    from finetune.quant.driver import Driver
    from finetune.quant.recipe import Recipe
    from finetune.quant.rounders.gptq import GPTQ
    from finetune.quant.rounders.rtn import RTN
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    model, tokenizer = ft.load(ModelConfig(path="embedded", fused="off"), DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, DenseConfig())
    training = DistillConfig(steps=STEPS)
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration, training.batch_tokens)

    todo = [(form, way) for form in FORMATS for way in WAYS]
    for form, way in todo:
        if form not in asked.formats or way not in asked.ways:
            continue
        if any((row["format"], row["way"]) == (form, way) for row in tables.read(RESULT)):
            continue
        name, settings = FORMATS[form]
        rate = SLOWLY if "slowly" in way else training.learning_rate
        chosen = replace(training, learning_rate=rate, targets="dense" if "dense stream" in way else "same")
        distiller = Distiller(chosen) if "distilled" in way else None
        twin, rounder = copy.deepcopy(model), GPTQ() if way.startswith("GPTQ") else RTN()
        begun = time.process_time()
        quant = QUANTIZERS.type_of(name)(**settings)
        Driver(twin, inspect(twin), Recipe(quant, rounder, distiller=distiller), batches).go()
        row = {"format": form, "way": way, "cpu_seconds": round(time.process_time() - begun, 1)}
        row |= {"learning_rate": rate} if distiller else {}
        row |= reference.compare(twin) | {"blocks": [asdict(each) for each in distiller.done] if distiller else []}
        rows = sorted([*tables.read(RESULT), row], key=lambda each: todo.index((each["format"], each["way"])))
        print(f"{form} {way:<36} KL {row['kl_mean']:.5f} perplexity {row['perplexity']:.2f}", flush=True)
        facts = {"pieces": PIECES, "length": LENGTH, "eval_tokens": row["tokens"], "distill": asdict(training)}
        tables.write(RESULT, **facts, rows=rows)
    if len(rows := tables.read(RESULT)) == len(todo):
        tables.put(PAGE, "bench_zeroquant", made(rows))


def made(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    found = {(row["format"], row["way"]): row for row in rows}
    lines = ["| KL (perplexity) | " + " | ".join(FORMATS) + " |", "| --- |" + " --- |" * len(FORMATS)]
    for way in WAYS:
        cells = [found[form, way] for form in FORMATS]
        lines.append(f"| {way} | " + " | ".join(f"{c['kl_mean']:.4f} ({c['perplexity']:.2f})" for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
