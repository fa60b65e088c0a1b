"""What rounding weights, inputs, or both to 8 bits costs an encoder that was fine-tuned: GLUE's SST-2 and CoLA.

`python scripts/bench_glue.py --data DIR --encoder DIR`: DIR/cls holds `sst2_train.jsonl`, `sst2_dev.jsonl`,
`cola_train.jsonl`, `cola_dev_in.jsonl` and `cola_dev_out.jsonl`, rows of text and label; the encoder is
all-MiniLM-L6-v2 (`make bench-encoder`). For each seed LoRA is trained with `train.py objective=classification` and
merged; then the projections of its blocks are replaced in memory and judged on every second one of GLUE's development
rows, which training never saw.

The table is that of Bondarenko et al. 2021 (arXiv:2109.12948, table 1: W8A8, W32A8, W8A32), over how inputs share a
scale: W8A32 are int8 weights alone, W32A8 dense weights and inputs rounded to 8 bits (in floating point: there is
nothing to store in fewer bits, so no such format exists), W8A8 both, by `quant=w8a8`'s own modules. Weights share one
scale a matrix, but where a row says channel. Scales that are static are those of the calibration rows.

SmoothQuant (arXiv:2211.10438) and the gamma migration of Outlier Suppression (arXiv:2209.13325) divide the output of a
norm. That output is a residual as well in a post-norm encoder, where no plain checkpoint has a place for the division;
here it is done in floating point at the projections that read a norm, as the latter paper does, which rounds the same.

Writes benchmarks/results/glue.json and the table of docs/quantization.md; rows in the file are kept.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

from finetune.kernels import w8a8  # noqa: E402

RESULT, PAGE = tables.RESULTS / "glue.json", tables.DOCS / "quantization.md"
TASKS = {"sst2": ("SST-2", "accuracy", 100), "cola": ("CoLA", "matthews", 300)}
"""Title, metric and steps of training."""
SEEDS, SAMPLES, ALPHA = 3, 128, 0.5
EVERY = 2
"""One development row of so many is measured on."""


@dataclass(frozen=True)
class Variant:
    """How the projections of the blocks are computed.

    Attributes:
        weights: dense | tensor | channel (what shares a scale), or llm.int8 for all of it.
        inputs: dense | tensor | token, or static for one scale from calibration.
        divided: none | smoothquant | gamma, of the inputs that come from a norm.
    """

    weights: str = "dense"
    inputs: str = "dense"
    divided: str = "none"


VARIANTS = {
    "W8A32": Variant("tensor"),
    "W8A32, weights by channel": Variant("channel"),
    **{f"W32A8, {inputs}": Variant("dense", inputs) for inputs in ("static", "tensor", "token")},
    **{f"W32A8, static, {by}": Variant("dense", "static", by) for by in ("smoothquant", "gamma")},
    **{f"W8A8, {inputs}": Variant("tensor", inputs) for inputs in ("static", "tensor", "token")},
    "W8A8, token, weights by channel": Variant("channel", "token"),
    **{f"W8A8, static, {by}": Variant("tensor", "static", by) for by in ("smoothquant", "gamma")},
    "LLM.int8()": Variant("llm.int8"),
}


class RoundedInputs(nn.Module):
    """A dense layer that reads its input rounded to 8 bits.

    Args:
        linear: dense.
        inputs: as of a `Variant`.
        largest: magnitude of an input in calibration.
    """

    def __init__(self, linear: nn.Module, inputs: str, largest: Tensor) -> None:
        super().__init__()
        self.linear, self.inputs = linear, inputs
        self.static = (largest / w8a8.levels(8)).view(1) if inputs == "static" else None

    def forward(self, x_BI: Tensor) -> Tensor:
        x_MI, most = x_BI.reshape(-1, x_BI.shape[-1]), w8a8.levels(8)
        scale = w8a8.input_scale(x_MI, 8, self.inputs == "token", self.static)
        rounded_MI = w8a8.round_to(x_MI, scale, -most - (self.static is not None), most).float() * scale
        return self.linear(rounded_MI.view_as(x_BI))


class Divided(nn.Module):
    """A layer whose input is divided by factors that its columns were multiplied by."""

    def __init__(self, linear: nn.Module, by_I: Tensor) -> None:
        super().__init__()
        self.linear, self.by_I = linear, by_I

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.linear(x_BI / self.by_I)


class Seen:
    """What projections read in calibration.

    Attributes:
        largest: of each projection, the magnitudes [I] of its inputs.
        norms: of those that read the output of a norm, that norm's name.
    """

    def __init__(self, model: nn.Module, names: list[str], batches: list[dict[str, Any]]) -> None:
        self.largest: dict[str, Tensor] = {}
        self.norms: dict[str, str] = {}
        made: dict[int, tuple[str, Tensor]] = {}  # outputs are held: memory that is used again would look alike
        handles = []

        def norm(name: str) -> Any:
            return lambda _module, _args, output: made.update({output.data_ptr(): (name, output)})

        def read(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                magnitudes_I = args[0].abs().flatten(0, -2).amax(0)
                self.largest[name] = torch.maximum(self.largest.get(name, magnitudes_I), magnitudes_I)
                if args[0].data_ptr() in made:
                    self.norms[name] = made[args[0].data_ptr()][0]

            return hook

        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                handles.append(module.register_forward_hook(norm(name)))
            elif name in names:
                handles.append(module.register_forward_pre_hook(read(name)))
        with torch.no_grad():
            for batch in batches:
                made.clear()
                model(**batch)
        for handle in handles:
            handle.remove()


def factors(model: Any, seen: Seen, divided: str) -> dict[str, Tensor]:
    """By what the inputs of projections that read a norm are divided."""
    by: dict[str, Tensor] = {}
    for norm in set(seen.norms.values()) if divided != "none" else ():
        readers = [name for name, source in seen.norms.items() if source == norm]
        by_I = model.get_submodule(norm).weight.detach().float()
        if divided == "smoothquant":
            weights = [model.get_submodule(name).dequantize(torch.float32).abs().amax(0) for name in readers]
            x_I, w_I = seen.largest[readers[0]].float(), torch.stack(weights).amax(0)
            by_I = (x_I.clamp(min=1e-5) ** ALPHA / w_I.clamp(min=1e-5) ** (1 - ALPHA)).clamp(min=1e-5)
        by |= {name: torch.where(by_I == 0, 1.0, by_I) for name in readers}
    return by


def changed(model: nn.Module, names: list[str], seen: Seen, variant: Variant) -> nn.Module:
    """A copy of a model with other modules for its projections."""
    twin, by = copy.deepcopy(model), factors(model, seen, variant.divided)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_I = by.get(name)
        largest_I = seen.largest[name] if by_I is None else seen.largest[name] / by_I.abs()
        made = replacement(twin.get_submodule(name), variant, by_I, largest_I.max())
        setattr(twin.get_submodule(parent), leaf, made if by_I is None else Divided(made, by_I))
    return twin


def replacement(dense: Any, variant: Variant, by_I: Tensor | None, largest: Tensor) -> nn.Module:
    """The module that stands for a projection."""
    from finetune.quant.base import QUANTIZERS
    from finetune.quant.dense import DenseConfig
    from finetune.quant.int8_storage import Int8Config
    from finetune.quant.w8a8 import IntegerLinear, W8A8Config

    w_OI = dense.dequantize(torch.float32) * (1.0 if by_I is None else by_I)
    static = variant.inputs == "static"
    inputs = "tensor" if static or variant.inputs == "dense" else variant.inputs
    configs = {"dense": DenseConfig(), "llm.int8": Int8Config()}
    config = configs.get(variant.weights) or W8A8Config(weights=variant.weights, activations=inputs, static=static)
    made = QUANTIZERS.build(config, *w_OI.shape, bias=dense.bias is not None, dtype=torch.float32, device="cpu")
    made.bias = dense.bias
    made.store(w_OI)
    if isinstance(made, IntegerLinear):
        made.see_inputs(largest)
        if variant.inputs == "dense":
            made.inputs = "none"
    fake = variant.weights == "dense" and variant.inputs != "dense"
    return RoundedInputs(made, variant.inputs, largest) if fake else made


def tune(task: str, seed: int, data: Path, encoder: Path, work: Path) -> Path:
    """A merged classifier, trained by the command line where it is not there yet."""
    run = work / f"{task}-{seed}"
    merged = run / "export" / "safetensors"
    if not (merged / "config.json").is_file():
        settings = [
            "objective=classification", f"model.path={encoder}", "quant=none", "train.dtype=fp32", "device=cpu",
            f"data.train={data / 'cls' / f'{task}_train.jsonl'}", "data.max_length=64", f"seed={seed}",
            f"train.max_steps={TASKS[task][2]}", f"train.eval_every={TASKS[task][2]}", "train.samples=0",
            "train.save_every=null", "export.formats=[safetensors]", "tracking=off", f"output_dir={run}", "name=glue",
        ]  # fmt: skip
        subprocess.run([sys.executable, str(ROOT / "train.py"), *settings], check=True)
    return merged


def measured(merged: Path, task: str, data: Path, variants: dict[str, Variant]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each variant gives on the development rows, by its name."""
    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.model.held import Held
    from finetune.quant.dense import DenseConfig
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Classes, Remembered
    from finetune.quantize.rows import BATCH_ROWS, Reader, read_rows
    from finetune.structure import inspect

    labels = ("0", "1")
    loaded = ModelConfig(path=str(merged), fused="off")
    model, tokenizer = ft.load(
        loaded, DenseConfig(), task=ft.Task("classification", labels), dtype="fp32", device="cpu"
    )
    cls = data / "cls"
    dev = [cls / "sst2_dev.jsonl"] if task == "sst2" else [cls / "cola_dev_in.jsonl", cls / "cola_dev_out.jsonl"]
    config = CalibrationConfig(
        calibration=str(cls / f"{task}_train.jsonl"), eval=[str(path) for path in dev], samples=SAMPLES, max_length=64
    )
    reader = Reader(config, Held("classification", labels), tokenizer, 512, True, False)
    text = read_rows(reader, len(tokenizer), DenseConfig(), tokenizer.pad_token_id, BATCH_ROWS)
    names = [projection.name for projection in inspect(model).projections]
    seen = Seen(model, names, text.batches())
    text.eval_rows = text.eval_rows[::EVERY]
    reference = Remembered(model, text.measured(len(labels)), Classes(len(labels), text.labelled))
    for name, variant in variants.items():
        yield name, reference.compare(changed(model, names, seen, variant))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "glue", help="where classifiers are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    options = parser.parse_args()
    for seed in options.seeds:
        for task in options.tasks:
            done = {row["variant"] for row in tables.read(RESULT) if (row["task"], row["seed"]) == (task, seed)}
            missing = {name: variant for name, variant in VARIANTS.items() if name not in done}
            if not missing:
                continue
            merged = tune(task, seed, options.data, options.encoder, options.work)
            for name, figures in measured(merged, task, options.data, missing):
                print(f"{task} {seed} {name:<32} {figures['accuracy']:.4f} {figures['matthews']:.4f}"
                      f" loss {figures['loss']:.4f} KL {figures['kl_mean']:.6f}", flush=True)  # fmt: skip
                write([*tables.read(RESULT), {"task": task, "seed": seed, "variant": name, **figures}])
    tables.put(PAGE, "bench_glue", made(tables.read(RESULT)))


def write(rows: list[dict[str, Any]]) -> None:
    """The result file."""
    steps = {task: steps for task, (*_, steps) in TASKS.items()}
    facts = {"encoder": "all-MiniLM-L6-v2", "steps": steps, "samples": SAMPLES, "every": EVERY}
    rows = sorted(rows, key=lambda row: (row["task"], row["seed"], list(VARIANTS).index(row["variant"])))
    tables.write(RESULT, **facts, rows=rows)


def made(rows: list[dict[str, Any]]) -> str:
    """The table of the page: the mean over seeds that are complete, and the largest distance."""
    counts = Counter((row["task"], row["seed"]) for row in rows)
    rows = [row for row in rows if counts[row["task"], row["seed"]] == len(VARIANTS)]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    head = [f"{title}, {metric} | loss | KL" for title, metric, _ in (TASKS[task] for task in tasks)]
    lines = [f"| | {' | '.join(head)} |", "| --- |" + " --- |" * 3 * len(tasks)]
    for name in ("dense", *VARIANTS):
        cells = [_cells(task, [row for row in rows if row["task"] == task], name) for task in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(task: str, rows: list[dict[str, Any]], name: str) -> str:
    """Metric, loss and KL of a variant; what the dense model gives is in every row."""
    dense = name == "dense"
    mine = list({row["seed"]: row for row in rows if dense or row["variant"] == name}.values())
    ending = "_dense" if dense else ""
    values, losses = ([row[f"{key}{ending}"] for row in mine] for key in (TASKS[task][1], "loss"))
    spread = max(abs(value - statistics.fmean(values)) for value in values)
    kl = "" if dense else f"{statistics.fmean(row['kl_mean'] for row in mine):.5f}"
    return f"{statistics.fmean(values):.3f} ± {spread:.3f} | {statistics.fmean(losses):.4f} | {kl}"


if __name__ == "__main__":
    main()
