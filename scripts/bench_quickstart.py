"""Run the quickstart as a user does and keep its figures: `python scripts/bench_quickstart.py`.

Writes benchmarks/results/quickstart.json: seconds and peak memory by phase, held-out losses, proofs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"


def main() -> None:
    """One run in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", f"output_dir={run}"], cwd=ROOT)
        seconds = time.perf_counter() - start
        record = json.loads((run / "run.json").read_text("utf-8"))
        proofs = [json.loads(path.read_text("utf-8")) for path in sorted(run.glob("export/*/export.json"))]
    result = {
        "machine": describe_machine(),
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": max(phase["peak_memory_bytes"] for phase in record["phases"].values()),
        "eval_loss_first": record["first_eval"],
        "eval_loss_best": record["best_eval"],
        "fall": 1 - record["best_eval"] / record["first_eval"],
        "phases": record["phases"],
        "proofs": proofs,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{seconds:.0f} s, {result['peak_memory_bytes'] / 1e9:.2f} GB, held-out loss {result['fall']:.1%} lower")


if __name__ == "__main__":
    main()
