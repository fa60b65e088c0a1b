"""A QLoRA training step against PEFT + bitsandbytes: `python scripts/bench_step.py --sizes 25m,160m --rounds 3`.

The same random Llama, LoRA r=16 on all linears, data, seed and AdamW for each engine. Engines take turns, each round in
a process of its own; step times are CPU time of one thread, medians over the rounds, written to
benchmarks/results/step_cpu.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from machine import describe_machine  # noqa: E402

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "step_cpu.json"
SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "25m": (384, 1024, 8, 6, 16000),
    "160m": (768, 2048, 12, 12, 32000),
}
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


def ours(size: str) -> tuple[list, Callable]:
    """finetune: NF4 with double quantization, LoRA, chunked cross entropy."""
    import torch

    import finetune.structure as structure
    from finetune.adapters.attach import attach
    from finetune.adapters.lora import LoRAConfig
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
    adapter = attach(model, LoRAConfig(rank=16, alpha=32))
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
    from peft import LoraConfig, get_peft_model

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
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(2)
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS
    )
    model = get_peft_model(model, config)
    model.train()
    return [p for p in model.parameters() if p.requires_grad], lambda ids: model(input_ids=ids, labels=ids).loss


ENGINES = {"finetune": ours, "peft+bitsandbytes": peft_bitsandbytes}


def batches(size: str, count: int):
    """A learnable pattern over a fixed random stream: 2 rows of 512 tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[size][-1]
    for _ in range(count):
        start = torch.randint(0, vocabulary, (2, 1), generator=generator)
        stride = torch.randint(1, 5, (2, 1), generator=generator)
        yield (start + stride * torch.arange(512)) % vocabulary


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def measure(engine: str, size: str, steps: int) -> dict[str, object]:
    """Train a few steps; median CPU seconds a step and the peak of resident memory above the imports, in bytes."""
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    base = memory("VmRSS")
    parameters, loss_of = ENGINES[engine](size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    losses, seconds = [], []
    for ids in batches(size, steps):
        start = time.process_time()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        seconds.append(time.process_time() - start)
    step = statistics.median(seconds[2:])
    return {
        "engine": engine,
        "size": size,
        "step_seconds": step,
        "tokens_per_second": 1024 / step,
        "losses": losses,
        "peak_bytes": memory("VmHWM") - base,
    }


def main() -> None:
    """Let the engines take turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="25m,160m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--engine", choices=ENGINES, help="one measurement in this process, printed as JSON")
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.sizes, options.steps)))
        return
    rows = []
    for size in options.sizes.split(","):
        runs: dict[str, list[dict]] = {engine: [] for engine in ENGINES}
        for _ in range(options.rounds):
            for engine in ENGINES:
                command = [sys.executable, __file__, "--engine", engine, "--sizes", size, "--steps", str(options.steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
        for engine, found in runs.items():
            middle = {
                key: statistics.median(run[key] for run in found)
                for key in ("step_seconds", "tokens_per_second", "peak_bytes")
            }
            rows.append(
                {"engine": engine, "size": size, "rounds": options.rounds, **middle, "losses": found[0]["losses"]}
            )
            print(json.dumps(rows[-1]), flush=True)
        mine, theirs = rows[-2], rows[-1]
        print(
            f"{size}: speed {mine['tokens_per_second'] / theirs['tokens_per_second']:.2f}x, "
            f"memory {mine['peak_bytes'] / theirs['peak_bytes']:.2f}x of {theirs['engine']}"
        )
    RESULTS.write_text(
        json.dumps({"machine": describe_machine(), "threads": 1, "rows": rows}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
