"""Offsite-tuning on the embedded base: does what is trained through an emulator serve the full model?

`python scripts/bench_offsite.py`: one block trains at either end, the middle of six is halved; the middle either as
layers are dropped, or taught on the base's own kind of text (never on the rows of the task), or (one seed) taught and
packed in NF4. For each seed: fine-tune the emulator, plug its blocks into the base, and fine-tune the base itself in
full for as many steps. Writes benchmarks/results/offsite.json and the table of docs/offsite.md; rows already in the
file are kept, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

from finetune.data.config import DataConfig  # noqa: E402
from finetune.data.pydocs import pretraining_sources  # noqa: E402

RESULT, PAGE = tables.RESULTS / "offsite.json", tables.DOCS / "offsite.md"
CUT = ["offsite.layers=[1,1]", "offsite.keep=0.5"]
TEACH = ["offsite.distill_steps=120", "train.learning_rate=1e-3", "train.eval_every=null", "train.save_every=null"]
EMULATORS = {
    "layer drop": ["offsite.distill_steps=0", "offsite.verbatim=true"],
    "taught": TEACH,
    "taught, NF4": [*TEACH, "offsite.quant=nf4"],
}
"""How the middle is made, and the settings of `finetune offsite split` for it."""
ONCE = "taught, NF4"
"""Made for the first seed alone."""
TUNE = ["train.max_steps=100", "train.learning_rate=3e-4", "train.eval_every=100", "train.save_every=null"]
QUIET = ["tracking=off", "export.formats=[]", "train.samples=0", "train.preflight=false", "quant=keep"]
PIECE, PIECES = 1200, 4000
"""Characters of a row of the owner's text, and how many rows are taken."""


def owners_text(path: Path) -> None:
    """Write rows of the text that the base was pretrained on: the standard library without what the task asks for."""
    pieces = [
        source.text[start : start + PIECE]
        for source in pretraining_sources()
        for start in range(0, len(source.text), PIECE)
    ]
    chosen = pieces[:: max(1, len(pieces) // PIECES)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), "utf-8")


def run(*arguments: str) -> float:
    """One command of ours, in seconds of the processor; what it says is shown where it fails."""
    before = _processor_seconds()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return _processor_seconds() - before


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loss_of(path: str) -> float:
    """Loss of a model on the task's held-out rows, nats a token."""
    import torch

    from finetune.data.batching import eval_batches
    from finetune.data.prepare import prepare
    from finetune.evaluation import loss_per_token
    from finetune.model.config import ModelConfig
    from finetune.model.load import load
    from finetune.quant.keep import KeepConfig
    from finetune.training.config import OBJECTIVES
    from finetune.training.objectives.sft import SFTConfig

    loaded = load(ModelConfig(path=path), KeepConfig(), torch.bfloat16, "cpu")
    rows: Any = prepare(DataConfig(train="pydocs"), loaded.tokenizer, context=512, seed=0).eval
    objective = OBJECTIVES.build(SFTConfig(), loaded.model)
    return loss_per_token(objective.loss_sum, eval_batches(rows, 8, loaded.pad_id)).loss


def train(directory: Path, seed: int, *settings: str) -> tuple[float, float]:
    """Fine-tune; the held-out loss at the end, and seconds of the processor."""
    seconds = run("train.py", *QUIET, *TUNE, *settings, f"seed={seed}", f"output_dir={directory}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1], seconds


def offsite(work: Path, name: str, seed: int) -> dict[str, Any]:
    """One emulator made, tuned and plugged in."""
    emulator, tuned, plugged = work / "emulator", work / "tuned", work / "plugged"
    verb = ("-m", "finetune", "offsite")
    data = f"data.train={work.parent / 'owner.jsonl'}"
    settings = [*CUT, *EMULATORS[name], data, f"seed={seed}", f"output_dir={work / 'taught'}"]
    split = run(*verb, "split", f"offsite.output={emulator}", *settings)
    loss, seconds = train(tuned, seed, f"model.path={emulator}", "adapter=layers")
    run(*verb, "plug", f"adapter.path={tuned / 'adapter'}", f"offsite.output={plugged}")
    shipped = sum(path.stat().st_size for path in emulator.glob("*.safetensors"))
    return {
        "emulator_zero_shot": loss_of(str(emulator)),
        "emulator_tuned": loss,
        "plugged_in": loss_of(str(plugged)),
        "shipped_bytes": shipped,
        "processor_seconds_split": round(split, 1),
        "processor_seconds_tune": round(seconds, 1),
    }


def made(document: dict[str, Any]) -> str:
    """Perplexities as a Markdown table, a line an emulator and seed, and whether their order is the published one."""
    rows, zero_shot = document["rows"], document["zero_shot"]
    full = {row["seed"]: row["fully_tuned"] for row in rows if row["emulator"] == "none"}
    columns = ["emulator", "seed", "shipped", "full, zero shot", "emulator, zero shot", "emulator, tuned"]
    columns += ["plugged in", "fully tuned", "in order"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in sorted(rows, key=lambda row: ([*EMULATORS, "none"].index(row["emulator"]), row["seed"])):
        if row["emulator"] == "none":
            continue
        losses = [zero_shot, row["emulator_tuned"], row["plugged_in"], full[row["seed"]]]
        order = "yes" if losses == sorted(losses, reverse=True) else "**no**"
        shown = [f"{math.exp(loss):.2f}" for loss in [zero_shot, row["emulator_zero_shot"], *losses[1:]]]
        megabytes = f"{row['shipped_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {' | '.join([row['emulator'], str(row['seed']), megabytes, *shown, order])} |")
    return "\n".join(lines)


def main() -> None:
    """Fill in the missing rows, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    document = {"zero_shot": None} | tables.read_all(RESULT)
    if document["zero_shot"] is None:
        document["zero_shot"] = loss_of("embedded")
    rows = document["rows"]
    with tempfile.TemporaryDirectory() as directory:
        owners_text(Path(directory) / "owner.jsonl")
        for seed in range(options.seeds):
            for name in ("none", *EMULATORS):
                known = any(row["seed"] == seed and row["emulator"] == name for row in rows)
                if known or (name == ONCE and seed > 0):
                    continue
                work = Path(directory) / f"{seed}-{name}".replace(", ", "-").replace(" ", "-")
                work.mkdir()
                row: dict[str, Any] = {"seed": seed, "emulator": name}
                if name == "none":
                    loss, seconds = train(
                        work / "run", seed, "model.path=embedded", "adapter=layers", "adapter.layers=all"
                    )
                    row |= {"fully_tuned": loss, "processor_seconds_tune": round(seconds, 1)}
                else:
                    row |= offsite(work, name, seed)
                rows.append(row)
                print(json.dumps(row), flush=True)
                settings = {"cut": CUT, "emulators": EMULATORS, "tune": TUNE}
                tables.write(RESULT, **document | {"settings": settings})
    tables.put(PAGE, "bench_offsite", made(document))
    print(made(document))


if __name__ == "__main__":
    main()
