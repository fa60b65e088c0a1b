"""Everything that wants a CUDA GPU, in one command: `make gpu`, or `python scripts/gpu_acceptance.py [--quick]`.

Checks the kernels against float64, measures them and a QLoRA step against bf16, bitsandbytes and PEFT, proves that a
33B- and a 65B-shaped model train within 23.5 and 46 GiB, and trains, kills, resumes and exports for real. At most nine
minutes (`--quick`: two). Installs nothing, uses the current interpreter from a plain checkout; PYTHONPATH may name a
folder with what the host lacks. A stage that fails or runs out of time costs the others nothing. Prints a table of bars
and writes benchmarks/results/gpu_<device>.json as it goes, copied to the folder $OUT where that is set.

Exit codes: 0 every bar that was measured is reached, 1 some is not, 2 there is no CUDA here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
from gpu.bars import judged, table  # noqa: E402
from gpu.stages import LIMIT, STAGES, Outcome, Stage, run_stage, spawn  # noqa: E402
from machine import describe_machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


class Record:
    """What was measured so far, on disk after every line."""

    def __init__(self, path: Path, quick: bool) -> None:
        self.path, self.quick = path, quick
        self.values: dict[str, float] = {}
        self.faults: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.notes: list[str] = []
        self.stages: dict[str, Outcome] = {}

    def receive(self, line: dict[str, Any]) -> None:
        """Take a stage's line."""
        kind, key = line.pop("kind"), line.pop("key")
        if kind == "value":
            self.values[key] = float(line["value"])
        elif kind == "fault":
            self.faults[key] = line["reason"]
        elif kind == "note":
            self.notes.append(key)
            print(f"  note: {key}", flush=True)
        else:
            self.details[key] = line
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        """A row for every bar."""
        reasons = {name: outcome.reason or "the stage ended without it" for name, outcome in self.stages.items()}
        return judged(self.values, self.faults, reasons)

    def write(self) -> None:
        """The whole record, replaced in one move."""
        record = {
            "format_version": 1,
            "date": datetime.date.today().isoformat(),
            "quick": self.quick,
            "machine": describe_machine(),
            "rows": self.rows(),
            "stages": {name: vars(outcome) for name, outcome in self.stages.items()},
            "notes": self.notes,
            "details": self.details,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        partial.replace(self.path)
        out = os.environ.get("OUT")
        if out:
            shutil.copy(self.path, Path(out) / self.path.name)


def accept(record: Record, stages: list[Stage], device: str, limit: float, script: Path = Path(__file__)) -> None:
    """Run stages one after another until the time is used up."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            left = limit - (time.perf_counter() - begun)
            if left < 10:
                record.stages[stage.name] = Outcome(0.0, "no time left")
                continue
            print(f"{stage.name} ...", flush=True)
            command = [sys.executable, str(script), "--stage", stage.name, "--device", device]
            command += ["--quick"] if record.quick else []
            log = Path(folder) / f"{stage.name}.log"
            record.stages[stage.name] = spawn(command, min(stage.seconds, left), record.receive, log)
            _report(record, stage, log)
            record.write()


def _report(record: Record, stage: Stage, log: Path) -> None:
    outcome = record.stages[stage.name]
    print(f"{stage.name}: {outcome.seconds:.0f} s, {outcome.reason or 'done'}", flush=True)
    if outcome.reason is not None:
        tails = {path.suffix[1:]: path.read_text("utf-8", "replace")[-4000:] for path in (log, log.with_suffix(".out"))}
        record.details[f"log_{stage.name}"] = tails


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def prepare_environment() -> None:
    """What the stages' processes inherit: nothing is fetched or tracked."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes: checks and kernel benchmarks only")
    parser.add_argument("--only", default="", help=f"stages by comma: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_acceptance: torch {torch.__version__} sees no CUDA device here, so nothing was measured:"
            " run this on a CUDA host",
            file=sys.stderr,
        )
        return 2
    prepare_environment()
    if options.stage:
        return run_stage(options.stage, torch.device(options.device), options.quick)
    names = [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in {stage.name for stage in STAGES}]
    if unknown:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(stage.name for stage in STAGES)}")
    stages = [stage for stage in STAGES if (stage.name in names if names else stage.quick or not options.quick)]
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    record = Record(RESULTS / f"gpu_{slug(name)}.json", options.quick)
    accept(record, stages, options.device, LIMIT[options.quick])
    rows = record.rows()
    record.write()
    print(table(rows))
    print(record.path)
    return 1 if any(row["result"] == "fail" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
