"""Kill a run with SIGKILL at random instants, resume it, and compare it bit for bit with the run that was never
stopped.

    python scripts/kill_resume.py --kills 200 --out benchmarks/results/kill_resume.json

Every trial is a run of its own directory: LoRA with dropout, packed rows, two micro-batches a step, several epochs,
and a checkpoint every third step. It is killed at an instant drawn uniformly over its life (a third of the runs
twice), resumed to its end, and then held against the reference: every metrics line but its timings, the final
weights, optimizer state and random state. The checkpoint that a resume will choose is read here as well, and held
against the reference's checkpoint of the same step. Processes are forked from one that has already imported
everything, so that the kills fall into the run and not into imports.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forked children must not inherit a pool of threads

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.data.rows import Row, TokenRows
from finetune.training import checkpoint
from finetune.training.config import TrainConfig
from finetune.training.loop import train
from finetune.training.objectives.sft import SFTConfig, build
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.run_directory import RunDirectory, read_metrics
from finetune.training.trackers.off import Off

VOCAB, ROWS, MAX_LENGTH = 97, 96, 48
TIMINGS = ("tokens_per_second", "peak_memory_bytes")
STEMS = ("parameters", "optimizer", "random")
TRAIN = TrainConfig(
    epochs=4,
    batch_size=2,
    grad_accumulation=2,
    learning_rate=1e-2,
    dtype="fp32",
    log_every=1,
    eval_every=10,
    save_every=3,
    keep_checkpoints=2,
)


def rows(count: int, seed: int) -> TokenRows:
    """Random rows of 4 to 20 tokens, their first third masked."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(3, VOCAB, int(draw.integers(4, 21))).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) // 3] = -100
        made.append(Row(ids, labels))
    return TokenRows.of(made)


def run(directory: Path, config: TrainConfig = TRAIN) -> None:
    """Start or resume the run of a directory, to its end."""
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(llama).eval()
    adapter = attach(model, LoRAConfig(rank=4, dropout=0.1))
    resumed = (directory / "run.json").exists()
    with RunDirectory.resume(directory) if resumed else RunDirectory.create("kill", directory) as held:
        train(
            model,
            adapter,
            rows(ROWS, 0),
            rows(8, 1),
            objective=build(SFTConfig(), model),
            config=config,
            optim=AdamWConfig(),
            run=held,
            tracker=Off(),
            accelerator=accelerate.Accelerator(cpu=True),
            pad_id=0,
            packing=True,
            max_length=MAX_LENGTH,
            seed=0,
        )
        held.update(status="finished")


def forked(directory: Path, config: TrainConfig = TRAIN) -> int:
    """Run a directory in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(directory.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            run(directory, config)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(process: int, directory: Path) -> None:
    """Wait for a child that must end well."""
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"a run failed with status {status}:\n{directory.with_suffix('.log').read_text()}")


def kill_after(process: int, seconds: float) -> bool:
    """SIGKILL a child after a while; False where it had ended by itself."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    return {f"{stem}/{name}": tensor for stem in STEMS for name, tensor in checkpoint.read_tensors(path, stem).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def curve(directory: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(directory)]


def choice_is_sound(directory: Path, reference: Path) -> bool:
    """Whether the checkpoint that a resume will choose is, bit for bit, the reference's of that step."""
    chosen, _ = checkpoint.newest_valid(directory / "checkpoints")
    return chosen is None or same(tensors(chosen), tensors(reference / "checkpoints" / chosen.name))


def trial(directory: Path, reference: Path, seconds: float, draw: random.Random) -> dict[str, int]:
    """One run, killed once or twice, resumed to its end."""
    counts = {"kills": 0, "kills_while_saving": 0, "invalid_chosen": 0}
    for _ in range(2 if draw.random() < 1 / 3 else 1):
        if kill_after(forked(directory), draw.uniform(0, seconds)):
            counts["kills"] += 1
        counts["kills_while_saving"] += bool(list(directory.glob("checkpoints/.tmp-*")))
        counts["invalid_chosen"] += not choice_is_sound(directory, reference)
    finish(forked(directory), directory)
    last = checkpoint.listed(reference / "checkpoints")[-1].name
    exact = curve(directory) == curve(reference) and same(
        tensors(directory / "checkpoints" / last), tensors(reference / "checkpoints" / last)
    )
    return {**counts, "exact": int(exact)}


def main() -> int:
    parser = argparse.ArgumentParser(description="kill and resume runs at random instants")
    parser.add_argument("--kills", type=int, default=200, help="stop after this many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(arguments.seed)
    total = {"kills": 0, "kills_while_saving": 0, "invalid_chosen": 0, "exact": 0}
    runs, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run(Path(folder) / "warm-up")  # what is imported or compiled late must not fall into the children's lives
        reference = Path(folder) / "reference"
        every = TrainConfig(**{**vars(TRAIN), "keep_checkpoints": 1000})
        finish(forked(reference, every), reference)
        begun = time.perf_counter()
        timing = Path(folder) / "timing"
        finish(forked(timing), timing)
        seconds = time.perf_counter() - begun
        steps = len([line for line in curve(reference) if "loss" in line])
        print(f"a run takes {seconds:.2f} s and {steps} steps", flush=True)
        while total["kills"] < arguments.kills:
            directory = Path(folder) / "trial"
            for key, value in trial(directory, reference, seconds, draw).items():
                total[key] += value
            runs += 1
            shutil.rmtree(directory)
            directory.with_suffix(".log").unlink()
            if runs % 10 == 0 or total["kills"] >= arguments.kills:
                print(f"{total['kills']}/{arguments.kills} kills, {total['exact']}/{runs} runs bit-exact", flush=True)
    result = {
        "format_version": 1,
        "runs": runs,
        "runs_bit_exact": total["exact"],
        "kills": total["kills"],
        "kills_while_saving": total["kills_while_saving"],
        "invalid_checkpoints_chosen": total["invalid_chosen"],
        "steps_per_run": steps,
        "seconds_per_run": round(seconds, 2),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": describe_machine(),
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0 if total["exact"] == runs and not total["invalid_chosen"] else 1


if __name__ == "__main__":
    sys.exit(main())
