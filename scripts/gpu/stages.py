"""The stages of the GPU acceptance: each runs in a process of its own, within a time of its own, and fails alone.

A stage prints one JSON line, marked, for each thing it has measured; so what was measured before a stage failed or ran
out of time is kept.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "@measured "
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "hydra-core", "omegaconf",
    "liger-kernel",
)  # fmt: skip
Emit = Callable[..., None]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: also the key of its bars.
        seconds: it may take.
        quick: whether `--quick` runs it.
        run: does it, given `emit(kind, key, **values)`, the device and whether to be quick. Kinds: "value" of a bar,
            "fault" of one (`reason`), "detail" for the record, "note" for people.
    """

    name: str
    seconds: int
    quick: bool
    run: Callable[[Emit, Any, bool], None]


def environment(emit: Emit, device: Any, quick: bool) -> None:
    """What there is, and what is missing."""
    import torch

    from finetune.kernels import native, triton_backend

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            emit("note", f"{name} is not installed: what needs it is not measured")
    found: dict[str, Any] = {"python": platform.python_version(), "packages": versions, "cpu_kernels": native.level()}
    if triton_backend.why_off() is not None:
        emit("note", f"the Triton kernels are off: {triton_backend.why_off()}")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(total / 2**30, 1),
            "in_use_gib": round((total - free) / 2**30, 2),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    emit("detail", "environment", **found)


def checks(emit: Emit, device: Any, quick: bool) -> None:
    """Every kernel against the reference and float64."""
    from gpu import checks as kernels

    results = kernels.run(str(device))
    emit("detail", "checks", results=results)
    emit("value", "checks", value=sum(not result["passed"] for result in results))


def kernels(emit: Emit, device: Any, quick: bool) -> None:
    """Kernel benchmarks."""
    import gpu_kernels

    gpu_kernels.measure_all(emit, device, quick)


def step(emit: Emit, device: Any, quick: bool) -> None:
    """QLoRA steps."""
    from gpu.steps import compare

    compare("7b" if device.type == "cuda" else "tiny", (4096, 8192), emit, device)


def memory_33b(emit: Emit, device: Any, quick: bool) -> None:
    """The smaller memory proof, and whether float32 adapters fit too."""
    from gpu.memory import prove, try_float32

    prove("33b", 23.5, emit, device)
    try_float32("33b", 23.5, emit, device)


def memory_65b(emit: Emit, device: Any, quick: bool) -> None:
    """The larger one."""
    from gpu.memory import prove

    prove("65b", 46.0, emit, device)


def training(emit: Emit, device: Any, quick: bool) -> None:
    """Real runs."""
    from gpu.training import train_all

    train_all(emit, str(device))


STAGES = (
    Stage("environment", 40, True, environment),
    Stage("checks", 110, True, checks),
    Stage("kernels", 100, True, kernels),
    Stage("memory_33b", 120, False, memory_33b),
    Stage("step", 120, False, step),
    Stage("training", 110, False, training),
    Stage("memory_65b", 140, False, memory_65b),
)
LIMIT = {False: 520, True: 105}
"""Seconds for everything; a stage gets what is left of it at most. By `quick`."""


def emit_line(kind: str, key: str, **values: Any) -> None:
    """A stage's measurement on its way to the parent."""
    print(MARK + json.dumps({"kind": kind, "key": key, **values}), flush=True)


def run_stage(name: str, device: Any, quick: bool) -> int:
    """In the child: run a stage; 1 and a line on stderr where it fails."""
    stage = next(stage for stage in STAGES if stage.name == name)
    try:
        stage.run(emit_line, device, quick)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


@dataclass
class Outcome:
    """How a stage ended: seconds it took, and why it did not end well."""

    seconds: float
    reason: str | None


def spawn(command: list[str], seconds: float, receive: Callable[[dict[str, Any]], None], log: Path) -> Outcome:
    """Run a stage's process, handing on what it measures as it comes; kill its whole group when time is up.

    Args:
        log: gets its stderr; what else it prints goes beside, to `.out`.
    """
    begun = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors, log.with_suffix(".out").open("w", encoding="utf-8") as chatter:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", start_new_session=True
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    receive(json.loads(line.removeprefix(MARK)))
                else:
                    chatter.write(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        _kill_group(process)
        reader.join(timeout=5)
        assert process.stdout is not None
        process.stdout.close()
    spent = round(time.perf_counter() - begun, 1)
    if code == 0:
        return Outcome(spent, None)
    if code is None:
        return Outcome(spent, f"out of time after {spent:.0f} s")
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return Outcome(spent, lines[-1][:300] if lines else f"exit {code}")


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
