"""Time GPTQ against llm-compressor's: `python scripts/bench_gptq_speed.py --oracle PYTHON`.

A Llama of the 160M shape (12 blocks of width 768, 2048 in the middle, 32000 tokens) with random weights is quantized to
symmetric int4 in groups of 128, act-order with static groups, on 128 rows of 512 random tokens: by `finetune quantize`,
and by `oneshot` of llm-compressor, in an environment of its own (scripts/make_vectors.py says how to make one) whose
Python `--oracle` names. Both read the same checkpoint and tokens and write a checkpoint; imports are not timed. Ours
also measures perplexity on one held-out row, and is true-sequential, which llm-compressor is not.

Every run is a process of its own with one thread, the two take turns, and medians of the processes' CPU time and of the
wall clock are compared: on a machine that others use the first is what says something. `--blocks`, `--samples` and
`--rounds` make it smaller; each size and dtype has a row of its own in benchmarks/results/gptq_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gptq_speed.json"
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
WORDS, GROUP = 32000, 128
OURS, THEIRS = "finetune", "llm-compressor"


def write_inputs(directory: Path, blocks: int, samples: int, length: int, dtype: str) -> None:
    """A random checkpoint, its tokenizer and random text."""
    import torch
    from bench_quantize_memory import write_text, write_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, num_hidden_layers=blocks, max_position_embeddings=4096, **SHAPE)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    write_text(directory / "text.jsonl", samples, length)
    write_text(directory / "eval.jsonl", 1, length)


def ours(directory: Path, samples: int, length: int, output: Path) -> dict[str, float]:
    """Quantize by the command."""
    import finetune.quant.driver
    import finetune.quantize.opening  # noqa: F401  (imported before the clocks start)
    from finetune.cli import quantize

    settings = {
        "model.path": directory / "base",
        "output": output,
        "device": "cpu",
        "quant": "int4",
        "quant.group_size": GROUP,
        "quant.symmetric": "true",
        "calibrator": "gptq",
        "data.calibration": directory / "text.jsonl",
        "data.eval": directory / "eval.jsonl",
        "data.samples": samples,
        "data.max_length": length,
    }
    begun, worked = time.perf_counter(), time.process_time()
    code = quantize([f"{key}={value}" for key, value in settings.items()])
    if code:
        sys.exit(code)
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked}


def theirs(directory: Path, samples: int, length: int, output: Path) -> dict[str, float]:
    """Quantize by llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line)["text"].split() for line in (directory / "text.jsonl").read_text("utf-8").splitlines()]
    ids = [[int(word[1:]) for word in row] for row in rows[:samples]]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * len(ids)})
    begun, worked = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder="static")
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=len(ids))
    model.save_pretrained(output, save_compressed=True)
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked}


def child(options: argparse.Namespace) -> None:
    """One run, in a process that does nothing else; its figures are the last line."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run = ours if options.child == OURS else theirs
        figures = run(options.directory, options.samples, options.length, Path(place) / "output")
    print(json.dumps(figures | {"torch": torch.__version__}))


def one_run(engine: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of a child."""
    python = sys.executable if engine == OURS else options.oracle
    sizes = ["--samples", str(options.samples), "--length", str(options.length)]
    command = [python, __file__, "--child", engine, "--directory", str(directory), *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine == OURS:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{engine} ended with {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{engine}: {figures['cpu_seconds']:.1f} s of CPU, {figures['seconds']:.1f} s", flush=True)
    return figures


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one size."""
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place), options.blocks, options.samples, options.length, options.dtype)
        for _ in range(options.rounds):
            for engine, found in runs.items():
                found.append(one_run(engine, options, Path(place)))
    row: dict[str, Any] = {key: getattr(options, key) for key in ("blocks", "samples", "length", "dtype", "rounds")}
    for engine, found in runs.items():
        for clock in ("cpu_seconds", "seconds"):
            row[f"{engine} {clock}"] = round(statistics.median(figures[clock] for figures in found), 2)
    for clock in ("cpu_seconds", "seconds"):
        pairs = zip(runs[THEIRS], runs[OURS], strict=True)
        row[f"speed by {clock}"] = round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)
    return row | {"torch of llm-compressor": runs[THEIRS][0]["torch"]}


def main() -> None:
    """Measure one size and put its row in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", help="the Python of an environment that has llm-compressor")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if not options.oracle:
        parser.error("--oracle PYTHON is needed")
    sys.path[:0] = [str(ROOT / "scripts")]
    from machine import describe_machine

    row = measured(options)
    told = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    same = ("blocks", "samples", "length", "dtype")
    rows = [old for old in told if any(old[key] != row[key] for key in same)] + [row]
    document = {"format_version": 1, "machine": describe_machine(), "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
