"""Does LoRA on an NF4 base learn as well as on the dense one? `python scripts/bench_learns.py`, with another base
by `--story-model DIR --story-data FILE`.

Runs train.py for each base, storage and seed, and writes the held-out losses to benchmarks/results/learns.json.
Rows already in the file are kept, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learns.json"
STORAGES = ("none", "nf4")
COMMON = ["export.formats=[]", "tracking=off", "train.samples=0", "train.preflight=false", "train.dtype=fp32"]


def tasks(story_model: str | None, story_data: str | None) -> dict[str, list[str]]:
    """Overrides of each task by its name."""
    found = {"embedded base, pydocs": ["train.max_steps=150", "train.eval_every=50", "train.save_every=null"]}
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


def one_run(overrides: list[str], storage: str, seed: int) -> dict[str, float]:
    """Train once in a directory of its own; first and last held-out loss, nats a token."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*COMMON, *overrides, f"quant={storage}", f"seed={seed}", f"output_dir={directory}/run"]
        subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [
            json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {"eval_loss_first": losses[0], "eval_loss_last": losses[-1]}


def main() -> None:
    """Fill in the missing rows, then print how far NF4 is from dense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--story-model", help="a second base: directory of a small pretrained model")
    parser.add_argument("--story-data", help="its rows")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    for task, overrides in tasks(options.story_model, options.story_data).items():
        for seed in range(options.seeds):
            for storage in STORAGES:
                key = {"task": task, "quant": storage, "seed": seed}
                if any(all(row[name] == value for name, value in key.items()) for row in rows):
                    continue
                rows.append({**key, **one_run(overrides, storage, seed)})
                print(json.dumps(rows[-1]), flush=True)
                RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n", "utf-8")
    for task in dict.fromkeys(row["task"] for row in rows):
        for seed in sorted({row["seed"] for row in rows if row["task"] == task}):
            loss = {row["quant"]: row["eval_loss_last"] for row in rows if (row["task"], row["seed"]) == (task, seed)}
            if set(loss) == set(STORAGES):
                dense, nf4 = loss["none"], loss["nf4"]
                print(f"{task}, seed {seed}: dense {dense:.4f}, NF4 {nf4:.4f}, ratio {nf4 / dense:.4f}")


if __name__ == "__main__":
    main()
