"""The CPU kernels beside their rivals: `python scripts/bench_kernels.py` (`--quick` for a look, `--threads 2`).

Decoding NF4, quantizing to it, and frozen linear layers in NF4, int8, grouped integers and llama.cpp's blocks, against
bf16 nn.Linear, bitsandbytes and torchao; and what surrounds the products in a training step, against torch. Engines run
in turn, each sample lasts some milliseconds, medians count; with one thread the CPU time of the process is measured
(other work on the machine hardly touches it), with several wall time. Decoding is measured an engine a process, once
with stock malloc, which maps outputs of 32 MiB and more anew each time, and once with pages recycled; so are the NF4
layers, since bitsandbytes decodes into such an output.

`--isa avx512_bf16` measures all engines as on a CPU without AMX (and says so in the results). Rows go into
benchmarks/results/kernels_cpu.json, where they replace those of the same instruction set, threads and section; as JSON
lines they go to stdout. scripts/performance_page.py makes docs/performance.md of it.

On a CUDA host `--gpu` measures the GPU kernels instead; `--gpu --tune` rewrites their dispatch table
(scripts/gpu_kernels.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
from machine import describe_machine  # noqa: E402

RESULTS = SCRIPTS.parent / "benchmarks" / "results" / "kernels_cpu.json"
ISAS = {  # what oneDNN and our kernels may use, in their own words
    "native": {},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "FINETUNE_CPU": "avx512_bf16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FINETUNE_CPU": "avx512"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "FINETUNE_CPU": "avx2"},
}
PAGES = {
    "stock": {},
    # Nothing is mapped on its own and nothing given back: what was freed serves the next call.
    "recycled": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
}
MARK = "ROW "
Job = tuple[str, str, dict[str, str]]
"""Section, pages, options of the worker."""


def jobs(sections: list[str], quick: bool) -> Iterator[Job]:
    """Every process to run, engines of the decoding section in turn."""
    if "dequantize" in sections:
        for _ in range(1 if quick else 3):
            for pages in PAGES:
                for engine in ("fill", "finetune", "bitsandbytes"):
                    yield "dequantize", pages, {"engine": engine}
    if "quantize" in sections:
        yield "quantize", "stock", {}
    if "around" in sections:
        yield "around", "stock", {}
    for family in ("nf4", "int8", "groups", "blocks"):
        if family in sections:
            for pages in PAGES if family == "nf4" else ("stock",):
                yield "linear", pages, {"family": family}


def run(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process; its rows, with what it ran under."""
    section, pages, own = job
    given = {"rounds": options.rounds, "seconds": options.seconds, "threads": options.threads, **own}
    command = [sys.executable, __file__, "--worker", section, *(f"--{key}={value}" for key, value in given.items())]
    environment = {
        **os.environ,
        **ISAS[options.isa],
        **PAGES[pages],
        "OMP_NUM_THREADS": str(options.threads),
        "BNB_DISABLE_KERNELS_HUB": "1",
    }
    done = subprocess.run(
        [*command, *(["--quick"] if options.quick else [])], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{section} {own}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    where = {"isa": options.isa, "threads": options.threads, "section": own.get("family", section), "pages": pages}
    rows = [{**where, **json.loads(line)} for line in lines]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def worker(options: argparse.Namespace) -> None:
    """In the process of one job: measure, and print a marked line a row."""
    import torch

    torch.set_num_threads(options.threads)
    from cpu.sections import SECTIONS

    def emit(**row: Any) -> None:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        print(MARK + json.dumps(rounded), flush=True)

    SECTIONS[options.worker](options, emit)


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the file held, without what was measured anew, and that."""

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("isa", "threads", "section"))

    new = {group(row) for row in rows}
    held = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []
    return sorted([row for row in held if group(row) not in new] + rows, key=group)


def level(isa: str) -> str:
    """The instruction set that our kernels take under a setting."""
    code = "from finetune.kernels import native; print(native.level())"
    environment = {**os.environ, **ISAS[isa], "PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    """Measure and write the file; with --gpu hand over."""
    if "--gpu" in sys.argv:
        sys.argv.remove("--gpu")
        import gpu_kernels

        gpu_kernels.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=ISAS, default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--sections", default="dequantize,quantize,nf4,int8,groups,blocks,around", help="some of them, with commas"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each engine")
    parser.add_argument("--seconds", type=float, default=0.02, help="a sample lasts at least")
    parser.add_argument("--quick", action="store_true", help="few rows, three rounds, nothing written")
    for hidden in ("--worker", "--engine", "--family"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    if options.quick:
        options.rounds = 3
    rows = [row for job in jobs(options.sections.split(","), options.quick) for row in run(job, options)]
    if options.quick:
        return
    levels = {isa: level(isa) for isa in ISAS}
    document = {"machine": describe_machine(), "levels": levels, "rows": merged(rows)}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in document.pop("rows"))
    head = json.dumps(document, indent=1)[:-2]
    RESULTS.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
