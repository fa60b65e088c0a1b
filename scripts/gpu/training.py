"""Real training on the GPU: `python train.py` on the embedded base, with its export and proof, killed and resumed.

All runs go at once: they are small, and starting Python takes most of their time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 40
COMMON = (
    "+experiment=smoke",
    "tracking=off",
    f"train.max_steps={STEPS}",
    "train.save_every=5",
    "train.eval_every=20",
    "train.samples=0",
)
RUNS: dict[str, tuple[str, ...]] = {
    "nf4": ("export.formats=[safetensors,bnb-nf4,peft]",),
    "paged_adamw_8bit": ("optim=paged_adamw_8bit", "export.formats=[]"),
    "adamw_8bit": ("optim=adamw_8bit", "export.formats=[]"),
    "fp16": ("train.dtype=fp16", "export.formats=[]"),
    "int8": ("quant=int8", "export.formats=[safetensors]"),
}
"""What each run has beside `COMMON`; "nf4" is also the reference of the run that is killed."""


def command(directory: Path, device: str, *overrides: str) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "train.py", *COMMON, f"device={device}", f"output_dir={directory}", *overrides]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, its output in a file."""
    with log.open("ab") as sink:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run; RuntimeError with its last line where it fails."""
    if code := process.wait():
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise RuntimeError(f"exit {code}: {lines[-1] if lines else 'no output'}")


def run(directory: Path, device: str, *overrides: str) -> None:
    """A run to its end, with what its run.json says checked.

    Raises:
        RuntimeError: where it fails, or an optimizer was replaced by another.
    """
    log = directory.with_suffix(".log")
    finish(start(command(directory, device, *overrides), log), log)
    record = json.loads((directory / "run.json").read_text("utf-8"))
    replaced = [note for note in record.get("notes", []) if "does not work on" in str(note)]
    if replaced and device != "cpu":
        raise RuntimeError(str(replaced[0]))


def killed_and_resumed(directory: Path, device: str, *overrides: str) -> None:
    """A run that gets SIGKILL as soon as a checkpoint is there, then `resume=`; RuntimeError where it was too fast."""
    log = directory.with_suffix(".log")
    process = start(command(directory, device, *overrides), log)
    while process.poll() is None and not any(directory.glob("checkpoints/step-*")):
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() == 0:
        raise RuntimeError("the run had ended before it could be killed")
    if not any(directory.glob("checkpoints/step-*")):
        finish(process, log)
    finish(start([sys.executable, "train.py", f"resume={directory}"], log), log)


def losses(directory: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = (json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def differing(one: dict[int, float], other: dict[int, float]) -> list[int]:
    """Steps whose losses are not the same bits, or that only one has."""
    return sorted(step for step in one.keys() | other.keys() if one.get(step) != other.get(step))


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Of the losses of a step, relative; 1 where only one has the step. A GPU's attention adds up in no fixed order."""
    pairs = ((one.get(step), other.get(step)) for step in one.keys() | other.keys())
    return max(1.0 if a is None or b is None else abs(a - b) / abs(a) for a, b in pairs)


def proofs(directory: Path) -> Iterator[dict[str, Any]]:
    """What each export's proof says."""
    for path in sorted(directory.glob("export/*/export.json")):
        found = json.loads(path.read_text("utf-8"))
        keys = ("kl_mean", "top1_agreement", "loss_base", "loss_trained", "loss_export", "passed")
        yield {"format": path.parent.name, **{key: found.get(key) for key in keys}}


def train_all(emit: Callable[..., None], device: str, runs: dict[str, tuple[str, ...]] | None = None) -> None:
    """All runs at once, and the reference once more, killed and resumed."""
    runs = RUNS if runs is None else runs
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(runs) + 1) as pool:
        jobs = {name: pool.submit(run, Path(folder) / name, device, *settings) for name, settings in runs.items()}
        again = pool.submit(killed_and_resumed, Path(folder) / "killed", device, *runs["nf4"])
        for name, job in [*jobs.items(), ("killed", again)]:
            begun = time.perf_counter()
            error = job.exception()
            directory = Path(folder) / name
            if error is not None:
                failed += 1
                emit("detail", f"training_{name}", error=str(error))
                continue
            curve = losses(directory)
            values = [curve[step] for step in sorted(curve)]
            found: dict[str, Any] = {
                "first_loss": values[0],
                "last_loss": values[-1],
                "proofs": list(proofs(directory)),
            }
            emit("detail", f"training_{name}", waited=round(time.perf_counter() - begun, 1), **found)
        if jobs["nf4"].exception() is None and again.exception() is None:
            whole, resumed = losses(Path(folder) / "nf4"), losses(Path(folder) / "killed")
            emit("detail", "resume", steps_not_the_same_bits=differing(whole, resumed))
            emit("value", "resume", value=largest_difference(whole, resumed))
    emit("value", "training", value=failed)
