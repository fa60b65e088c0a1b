"""Does LoRA on a quantized base learn as well as on the dense one, and do bf16 adapters as well as float32 ones?

`python scripts/bench_learns.py`, with another base by `--story-model DIR --story-data FILE`; the second question by
`--compare adapter`; all integer storages, one short run each, by `--compare integers --seeds 1`. Runs train.py for each
base, choice and seed, and writes the held-out losses to benchmarks/results/learns.json or learns_<comparison>.json.
Rows already in the file are kept, so an interrupted benchmark goes on where it stopped. Bases of GPTQ are made by
`finetune quantize`, int4 in groups of 128, calibrated on 64 pieces of 256 tokens of what is trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMON = ["export.formats=[]", "tracking=off", "train.samples=0", "train.preflight=false"]
GPTQ = "gptq-int4-128"
"""Stands for a base that `finetune quantize` makes."""
SHORT = ["train.max_steps=150", "train.eval_every=50", "train.save_every=null"]


@dataclass(frozen=True)
class Comparison:
    """Values of one key.

    Attributes:
        key, values: of the configuration; the first value is the reference.
        names: what the values are called in print.
        common: overrides of all runs.
    """

    key: str
    values: tuple[str, ...]
    names: tuple[str, ...]
    file: str
    common: tuple[str, ...]


COMPARISONS = {
    "storage": Comparison(
        "quant",
        ("none", "nf4", "int8", GPTQ),
        ("dense", "NF4", "LLM.int8()", "GPTQ int4 g128"),
        "learns.json",
        ("train.dtype=fp32",),
    ),
    "integers": Comparison(
        "quant",
        ("none", "nf4", "int8", "int8g", "int4", "int3", "int2"),
        ("dense", "NF4", "LLM.int8()", "int8g", "int4", "int3", "int2"),
        "learns_integers.json",
        ("train.dtype=fp32",),
    ),
    "adapter": Comparison(
        "adapter.dtype", ("fp32", "bf16"), ("float32", "bf16"), "learns_adapter.json", ("train.dtype=bf16", "quant=nf4")
    ),
}


def tasks(compare: str, story_model: str | None, story_data: str | None) -> dict[str, list[str]]:
    """Overrides of each task by its name."""
    embedded = "embedded base, pydocs"
    if compare == "adapter":
        headline = ["adapter.rank=64", "adapter.alpha=16", "train.learning_rate=1e-4", "train.schedule=constant"]
        return {embedded: SHORT, f"{embedded}, rank and learning rate of qlora_33b": [*SHORT, *headline]}
    if compare == "integers":
        return {f"{embedded}, 60 steps": ["train.max_steps=60", "train.eval_every=20", "train.save_every=null"]}
    found = {embedded: SHORT}
    if story_model and story_data:
        # The gap closes while it trains, so a short run is kept on record beside the full one.
        for name, rows, steps in (("TinyStories", 8, 300), ("TinyStories, short", 2, 150)):
            found[f"tinystories-656k, {name}"] = [
                f"model.path={story_model}",
                f"data.train={story_data}",
                "data.max_length=256",
                f"train.batch_size={rows}",
                f"train.max_steps={steps}",
                f"train.eval_every={steps // 3}",
                "train.save_every=null",
            ]
    return found


def quantized(overrides: list[str], directory: str) -> list[str]:
    """Quantize the base of a task; the overrides with that base in its place."""
    told = dict(override.split("=", 1) for override in overrides)
    settings = {
        "model.path": told.get("model.path", "embedded"),
        "data.calibration": told.get("data.train", "pydocs"),
        "data.max_length": "256",
        "data.samples": "64",
        "quant": "int4",
        "quant.group_size": "128",
        "calibrator": "gptq",
        "dtype": "fp32",
        "output": f"{directory}/base",
    }
    command = [sys.executable, "-m", "finetune", "quantize", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    kept = [override for override in overrides if not override.startswith(("model.path=", "quant="))]
    return [*kept, f"model.path={directory}/base", "quant=keep"]


def one_run(overrides: list[str]) -> dict[str, float]:
    """Train once in a directory of its own; first and last held-out loss, nats a token."""
    with tempfile.TemporaryDirectory() as directory:
        if f"quant={GPTQ}" in overrides:
            overrides = quantized(overrides, directory)
        arguments = [*COMMON, *overrides, f"output_dir={directory}/run"]
        subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [
            json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {"eval_loss_first": losses[0], "eval_loss_last": losses[-1]}


def main() -> None:
    """Fill in the missing rows, then print how far the other values are from the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", choices=COMPARISONS, default="storage")
    parser.add_argument("--story-model", help="a second base: directory of a small pretrained model")
    parser.add_argument("--story-data", help="its rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="tasks whose names have this in them")
    options = parser.parse_args()
    compared = COMPARISONS[options.compare]
    file = RESULTS / compared.file
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    for task, overrides in tasks(options.compare, options.story_model, options.story_data).items():
        for seed in range(options.seeds if options.only in task else 0):
            for value in compared.values:
                key = {"task": task, compared.key: value, "seed": seed}
                if any(all(row[name] == value for name, value in key.items()) for row in rows):
                    continue
                settings = [*compared.common, *overrides, f"{compared.key}={value}", f"seed={seed}"]
                rows.append({**key, **one_run(settings)})
                print(json.dumps(rows[-1]), flush=True)
                file.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n", "utf-8")
    for task in dict.fromkeys(row["task"] for row in rows):
        for seed in sorted({row["seed"] for row in rows if row["task"] == task}):
            same = [row for row in rows if (row["task"], row["seed"]) == (task, seed)]
            loss = {row[compared.key]: row["eval_loss_last"] for row in same}
            named = [(name, loss[v]) for name, v in zip(compared.names, compared.values, strict=True) if v in loss]
            for name, value in named[1:]:
                first = named[0][1]
                print(f"{task}, seed {seed}: {named[0][0]} {first:.4f}, {name} {value:.4f}, ratio {value / first:.4f}")


if __name__ == "__main__":
    main()
