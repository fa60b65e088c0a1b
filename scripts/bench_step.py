"""A QLoRA training step against PEFT + bitsandbytes: `python scripts/bench_step.py`, and again with `--threads 2`.

The same random Llama, LoRA r=16 on all linears, data, seed and AdamW for each engine. Engines take turns, each round in
a process of its own; medians over the rounds go to benchmarks/results/step_cpu.json (step_cpu_2_threads.json). With one
thread a step's time is its CPU time, which other work on the machine hardly changes; with more it is wall time, and
wants a quiet machine. The first engine is what the others are compared with; its losses have to stay within 1 % of
theirs at every step.

`--compare dora` measures DoRA's step beside LoRA's instead, over several numbers of tokens, step by step in turns in
one process, because their ratio is small beside what else goes on: step_dora_cpu.json.
`--isa avx512_bf16` measures as on a CPU without AMX and writes files of its own (step_cpu_avx512_bf16.json).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_kernels import ISAS  # noqa: E402
from machine import describe_machine  # noqa: E402

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "25m": (384, 1024, 8, 6, 16000),
    "160m": (768, 2048, 12, 12, 32000),
}
ROWS = 2
"""Of a batch."""
WARM_UP = 2
"""Steps before the clock counts."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_llama(size: str):
    """The benchmark's model: random weights of seed 0 in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def ours(size: str, adapter_dtype: str = "fp32", method: str = "lora") -> tuple[list, Callable]:
    """finetune: NF4 with double quantization, LoRA in the default float32, fused modules, chunked cross entropy."""
    import torch

    import finetune.structure as structure
    from finetune.adapters.attach import attach
    from finetune.adapters.base import ADAPTERS
    from finetune.data.rows import Batch
    from finetune.model.exchange import exchange
    from finetune.quant.freeze import freeze
    from finetune.quant.nf4 import NF4Config
    from finetune.training.config import OBJECTIVES
    from finetune.training.objectives.sft import SFTConfig

    model = random_llama(size)
    freeze(model, NF4Config(), structure.inspect(model))
    exchange(model)
    torch.manual_seed(2)
    adapter = attach(model, ADAPTERS.type_of(method)(rank=16, alpha=32, dtype=adapter_dtype))
    objective = OBJECTIVES.build(SFTConfig(), model)
    model.train()

    def loss(ids):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        total, count = objective.loss_sum(Batch(ids, ids, positions, None))
        return total / count

    return list(adapter.trainable().values()), loss


def peft_bitsandbytes(size: str) -> tuple[list, Callable]:
    """PEFT over bitsandbytes' NF4 with double quantization, as its users run it."""
    import bitsandbytes as bnb
    import torch

    model = random_llama(size)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in TARGETS:
            continue
        linear = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        linear.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        model.set_submodule(name, linear.to("cpu"))
    model.is_loaded_in_4bit = True
    return with_peft(model)


def peft_bf16(size: str) -> tuple[list, Callable]:
    """PEFT over the dense base in bfloat16."""
    return with_peft(random_llama(size))


def with_peft(model) -> tuple[list, Callable]:
    """PEFT's LoRA on a base, and the model's own loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(2)
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS
    )
    model = get_peft_model(model, config)
    model.train()
    return [p for p in model.parameters() if p.requires_grad], lambda ids: model(input_ids=ids, labels=ids).loss


ENGINES: dict[str, Callable[[str], tuple[list, Callable]]] = {
    "finetune": ours,
    "finetune, bf16 adapters": lambda size: ours(size, "bf16"),
    "peft+bitsandbytes": peft_bitsandbytes,
    "peft bf16": peft_bf16,
    "finetune, dora": lambda size: ours(size, method="dora"),
}
COMPARISONS = {"engines": [*ENGINES][:4], "dora": ["finetune", "finetune, dora"]}
TOGETHER = ("dora",)
"""Comparisons whose engines share a process, which then has no peak of memory for each."""
LENGTHS = {"engines": (512,), "dora": (128, 256, 512)}
"""Tokens of a row, by comparison."""


def batches(count: int, length: int):
    """Walks modulo a small prime, so that the loss falls when learning works."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        start = torch.randint(0, 97, (ROWS, 1), generator=generator)
        stride = torch.randint(1, 7, (ROWS, 1), generator=generator)
        yield (start + stride * torch.arange(length)) % 97 + 3


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def measure(engines: list[str], size: str, length: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """Train a few steps, the engines in turns; median seconds a step of each, and of one alone the peak of resident
    memory above the imports, in bytes."""
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    base = memory("VmRSS")
    built = [ENGINES[engine](size) for engine in engines]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    optimizers = [torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0) for parameters, _ in built]
    losses: list[list[float]] = [[] for _ in engines]
    seconds: list[list[float]] = [[] for _ in engines]
    for ids in batches(steps, length):
        for turn, ((_, loss_of), optimizer) in enumerate(zip(built, optimizers, strict=True)):
            start = clock()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[turn].append(round(loss.item(), 4))
            seconds[turn].append(clock() - start)
    peak = {"peak_bytes": memory("VmHWM") - base} if len(engines) == 1 else {}
    return [
        {"step_seconds": statistics.median(mine[WARM_UP:]), **peak, "losses": lost}
        for mine, lost in zip(seconds, losses, strict=True)
    ]


def take_turns(engines: list[str], size: str, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, a row for each engine."""
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    threads, rounds = options.threads, options.rounds
    environment = {**os.environ, **ISAS[options.isa], "OMP_NUM_THREADS": str(threads)}
    groups = [engines] if options.compare in TOGETHER else [[engine] for engine in engines]
    for _ in range(rounds):
        for group in groups:
            command = [sys.executable, __file__, "--engine", *group, "--sizes", size, "--length", str(length)]
            command += ["--steps", str(options.steps), "--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            for engine, found in zip(group, json.loads(done.stdout.splitlines()[-1]), strict=True):
                runs[engine].append(found)
    rows = []
    for engine, found in runs.items():
        step = statistics.median(run["step_seconds"] for run in found)
        tokens = ROWS * length
        figures = {"step_seconds": step, "tokens_per_second": tokens / step}
        if "peak_bytes" in found[0]:
            figures["peak_bytes"] = statistics.median(run["peak_bytes"] for run in found)
        row = {"engine": engine, "size": size, "tokens": tokens, "threads": threads, "rounds": rounds, **figures}
        rows.append({**row, "losses": found[0]["losses"]})
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Print the first engine's speed and memory against the others', and how far their losses are apart."""
    mine, *others = rows
    for row in others:
        speed = mine["tokens_per_second"] / row["tokens_per_second"]
        share = f" and {mine['peak_bytes'] / row['peak_bytes']:.2f}x the memory" if "peak_bytes" in row else ""
        apart = max(abs(a - b) / b for a, b in zip(mine["losses"], row["losses"], strict=True))
        verdict = "within" if apart <= 0.01 else "NOT WITHIN"
        where = f"{mine['size']}, {mine['tokens']} tokens, {mine['threads']} threads"
        print(
            f"{where}: {speed:.2f}x the speed{share} of {row['engine']};"
            f" losses differ by {apart:.2%} at most, {verdict} 1 %",
            flush=True,
        )


def results_file(comparison: str, isa: str, threads: int) -> Path:
    """Where a comparison's rows go: a file for each way of measuring, so that none is written over another's."""
    parts = ["step", *(["dora"] if comparison == "dora" else []), "cpu", *([isa] if isa != "native" else [])]
    return RESULTS / ("_".join([*parts, *([f"{threads}_threads"] if threads != 1 else [])]) + ".json")


def main() -> None:
    """Let the engines take turns, write the medians and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="25m,160m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time, more wall time")
    parser.add_argument("--compare", choices=COMPARISONS, default="engines")
    parser.add_argument("--isa", choices=ISAS, default="native", help="measure as on a CPU with no more than this")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, help="measure these here, in turns, printed as JSON")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, for --engine")
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.sizes, options.length, options.steps, options.threads)))
        return
    rows: list[dict[str, Any]] = []
    for size in options.sizes.split(","):
        for length in LENGTHS[options.compare]:
            found = take_turns(COMPARISONS[options.compare], size, length, options)
            rows += found
            compare(found)
    result = {"machine": describe_machine(), "isa": options.isa, "threads": options.threads, "rows": rows}
    file = results_file(options.compare, options.isa, options.threads)
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
