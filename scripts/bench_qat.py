"""QAT against quantizing afterwards, at 3 and 2 bits on the embedded base: `python scripts/bench_qat.py`.

Every model trains on the same pieces of documentation, in the same order, for as many steps and at the same rate (plain
next-token loss, AdamW, 5 steps of warm-up, cosine), and is measured on pieces of the held-out half: the base as it is,
quantized by GPTQ; LoRA on the dense base, merged and then quantized by GPTQ; `adapter=qat`, whose merged weights are
the integers; and `adapter=qat_scales` on the base quantized by GPTQ, at the rate of its own. Groups of 32 with integer
zero points, defaults otherwise; GPTQ is calibrated on training pieces. `--steps` alone measures a training step of LoRA
and of QAT instead, taking turns, in seconds of the CPU on one thread.

Writes benchmarks/results/qat.json row by row, so that an interrupted benchmark goes on where it stopped (`--seed` keeps
to one seed), then the tables of docs/qat.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "qat.json", tables.DOCS / "qat.md"
BITS, SEEDS, GROUP = (3, 2), (0, 1, 2), 32
STEPS, LENGTH, EVAL, CALIBRATION = 60, 256, 8, 24
"""Optimizer steps of one piece each, tokens of a piece, pieces that are measured on, pieces that GPTQ looks at."""
RATE, WARM_UP = 4e-3, 5
TIMED, TURNS = (128, 512), 7
"""Tokens of a timed step, and how often both take their turn."""
DENSE, PTQ, LORA, LORA_PTQ, QAT, SCALES = "base", "base, GPTQ", "LoRA", "LoRA, GPTQ", "QAT", "GPTQ, scales"
Row = dict[str, Any]


class Base:
    """The dense model, the text of both halves, and what it is compared with."""

    def __init__(self) -> None:
        import finetune as ft
        from finetune.model.config import ModelConfig
        from finetune.quant.affine import Int4Config
        from finetune.quant.dense import DenseConfig
        from finetune.quantize.config import CalibrationConfig
        from finetune.quantize.measure import Reference
        from finetune.quantize.text import read_text

        self.model, tokenizer = ft.load(
            ModelConfig(path="embedded", fused="off"), DenseConfig(), dtype="fp32", device="cpu"
        )
        told = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=1 << 30, max_length=LENGTH)
        text = read_text(told, tokenizer, len(tokenizer), LENGTH, Int4Config())
        self.pieces = [piece for piece in text.calibration if len(piece) == LENGTH]
        self.reference = Reference(self.model, text.eval[:EVAL])

    def shuffled(self, seed: int) -> list[Any]:
        """Pieces to train on, in order."""
        import torch

        order = torch.randperm(len(self.pieces), generator=torch.Generator().manual_seed(seed))
        return [self.pieces[number] for number in order[:STEPS].tolist()]

    def loss(self, model: Any) -> float:
        """Nats a token on the held-out half."""
        return float(self.reference.compare(model)["loss"])

    def trained(self, config: Any, seed: int, model: Any = None, rate: float = RATE) -> tuple[Any, Any]:
        """A copy of a model, by default the dense one, that has trained with an adapter, and the adapter."""
        import torch

        from finetune.adapters.attach import attach

        twin = copy.deepcopy(self.model if model is None else model)
        torch.manual_seed(seed)
        adapter = attach(twin, config)
        step = stepping(twin, adapter)
        twin.train()
        for number, piece in enumerate(self.shuffled(seed)):
            share = min(1, (number + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / STEPS))
            step(piece[None], rate * share)
        return twin.eval(), adapter

    def gptq(self, model: Any, bits: int, seed: int) -> Any:
        """A copy that is quantized after the fact."""
        from finetune.quant.driver import Driver
        from finetune.quant.recipe import Recipe
        from finetune.quant.rounders.gptq import GPTQ
        from finetune.quantize.text import batches_of
        from finetune.structure import inspect

        twin = copy.deepcopy(model)
        batches = batches_of(self.shuffled(seed)[:CALIBRATION], 2 * LENGTH)
        Driver(twin, inspect(twin), Recipe(storage(bits), GPTQ()), batches).go()
        return twin


def storage(bits: int) -> Any:
    """The integers that everything is rounded to."""
    from finetune.quant.affine import Int2Config, Int3Config

    return {3: Int3Config, 2: Int2Config}[bits](group_size=GROUP)


def stepping(model: Any, adapter: Any) -> Any:
    """One optimizer step on a batch at a rate."""
    import torch

    scales = adapter.learning_rate_scales()
    groups = [{"params": [p], "times": scales.get(name, 1.0)} for name, p in adapter.trainable().items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def step(ids: Any, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(adapter.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(base: Base, seed: int, rows: list[Row]) -> None:
    """All rows of a seed that are missing, what others start from first."""
    from finetune.adapters.lora import LoRAConfig
    from finetune.adapters.qat import QATConfig
    from finetune.adapters.qat_scales import QATScalesConfig

    done = {(row["method"], row["bits"]) for row in rows if row["seed"] == seed}
    for bits in BITS:
        if (QAT, bits) not in done:
            add(seed, QAT, bits, base.loss(base.trained(QATConfig(bits=bits, group_size=GROUP), seed)[0]))
    if any((LORA_PTQ, bits) not in done for bits in BITS):
        model, adapter = base.trained(LoRAConfig(), seed)
        add(seed, LORA, 0, base.loss(model))
        merged = dict(adapter.merged())
        adapter.unmount()
        for name, weight in merged.items():
            model.get_submodule(name.removesuffix(".weight")).store(weight)
        for bits in BITS:
            add(seed, LORA_PTQ, bits, base.loss(base.gptq(model, bits, seed)))
    for bits in BITS:
        if (SCALES, bits) not in done:
            model, scales = base.gptq(base.model, bits, seed), QATScalesConfig()
            add(seed, PTQ, bits, base.loss(model))
            add(seed, SCALES, bits, base.loss(base.trained(scales, seed, model, scales.learning_rate)[0]))
    if not seed and (DENSE, 0) not in done:
        add(seed, DENSE, 0, base.loss(base.model))


def add(seed: int, method: str, bits: int, loss: float) -> None:
    """Put a row into the file, in the place of one that is there."""
    document = tables.read_all(RESULT)
    key = {"method": method, "bits": bits, "seed": seed}
    rest = [row for row in document["rows"] if not key.items() <= row.items()]
    print(f"seed {seed}  {bits or '-'} bits  {method:<11} perplexity {math.exp(loss):.3f}", flush=True)
    write(document | {"rows": [*rest, {**key, "loss": loss, "perplexity": math.exp(loss)}]})


def time_steps(base: Base) -> list[Row]:
    """Median seconds of the CPU that a step takes with LoRA and with QAT, which take turns."""
    import torch

    from finetune.adapters.attach import attach
    from finetune.adapters.lora import LoRAConfig
    from finetune.adapters.qat import QATConfig

    steps = {}
    for name, config in ((LORA, LoRAConfig()), (QAT, QATConfig(bits=3, group_size=GROUP))):
        twin = copy.deepcopy(base.model)
        steps[name] = stepping(twin.train(), attach(twin, config))
    found = []
    for tokens in TIMED:
        ids = torch.cat(base.shuffled(0)[:2]).view(-1, min(tokens, LENGTH))[: max(1, tokens // LENGTH)]
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(TURNS):
            for name, step in steps.items():
                begun = time.process_time()
                step(ids, RATE)
                seconds[name].append(time.process_time() - begun)
        medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
        found.append({"tokens": ids.numel(), "seconds": medians, "ratio": medians[QAT] / medians[LORA]})
        print(found[-1], flush=True)
    return found


def write(document: dict[str, Any]) -> None:
    """The file, with what it was made on."""
    facts = {"steps": STEPS, "tokens_per_step": LENGTH, "group_size": GROUP, "learning_rate": RATE}
    tables.write(RESULT, **document | facts)


LINES = (
    ("the base, and GPTQ of it", DENSE, PTQ),
    ("LoRA, and GPTQ after merging", LORA, LORA_PTQ),
    ("`adapter=qat`", "", QAT),
    ("GPTQ of the base, then `adapter=qat_scales`", "", SCALES),
)


def made(rows: list[Row]) -> str:
    """Perplexities, the mean and the range over seeds."""
    lines = ["| held-out perplexity | dense | 3 bits | 2 bits |", "| --- | ---: | ---: | ---: |"]
    for title, dense, rounded in LINES:
        cells = []
        for method, bits in ((dense, 0), *((rounded, bits) for bits in BITS)):
            found = [row["perplexity"] for row in rows if row["method"] == method and row["bits"] == bits]
            spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}" if found else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, choices=SEEDS, help="this seed alone, and no page")
    parser.add_argument("--steps", action="store_true", help="time a step of LoRA and of QAT, and nothing else")
    parser.add_argument("--page", action="store_true", help="write the page from the file, and nothing else")
    told = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if not told.page:
        base = Base()
        if told.steps:
            found = time_steps(base)
            write(tables.read_all(RESULT) | {"step": found})
            return
        for seed in SEEDS if told.seed is None else (told.seed,):
            measure(base, seed, tables.read(RESULT))
    if told.seed is None:
        tables.put(PAGE, "bench_qat", made(tables.read(RESULT)))


if __name__ == "__main__":
    main()
