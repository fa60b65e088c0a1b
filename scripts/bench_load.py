"""Measure the memory of a load: `python scripts/bench_load.py --gigabytes 1.6`.

Writes a random Llama checkpoint of that size in shards of 300 MB to a temporary directory, loads it with NF4 and double
quantization in a fresh process, and notes how far memory rose above what the imports took: anonymous pages (what the
process holds of its own, sampled), and the resident set's high-water mark (mapped pages of the checkpoint included).
The bar is the quantized model plus one shard. Writes benchmarks/results/load_memory.json. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "load_memory.json"
SHARD_BYTES = 300_000_000
SAMPLE_SECONDS = 0.005


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    """A random bfloat16 Llama of about that many 10^9 bytes, made one shard at a time."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    hidden, inner, vocabulary = 2048, 5632, 32000
    block = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / block))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    config.save_pretrained(directory)
    vocab = {f"w{i}": i for i in range(vocabulary)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w0"))).save_pretrained(
        directory
    )
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * shape.numel()
    weight_map = {}
    for index, names in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16).mul_(0.02) for name in names}
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Sampler(threading.Thread):
    """Keeps the largest anonymous resident set seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, status("RssAnon"))


def measure(directory: Path) -> dict[str, Any]:
    """Load the checkpoint in this process, which should have done nothing before."""
    import torch

    from finetune.model import digest, pretrained  # noqa: F401  (imported before the baseline is taken)
    from finetune.model.check import check_directory
    from finetune.model.config import ModelConfig
    from finetune.model.describe import storage_table
    from finetune.model.load import load
    from finetune.quant.base import QUANTIZERS
    from finetune.quant.nf4 import NF4Config

    QUANTIZERS.scan()
    torch.set_num_threads(1)  # on a machine that others use, threads that wait for one another would be what is timed
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    anonymous, resident = status("RssAnon"), status("VmRSS")
    sampler = Sampler()
    sampler.start()
    start, worked = time.perf_counter(), time.process_time()
    loaded = load(ModelConfig(path=str(directory)), NF4Config(), torch.bfloat16, "cpu")
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    sampler.done.set()
    sampler.join()
    high_water = status("VmHWM") - resident
    start = time.perf_counter()
    digest.base_digest(check_directory(directory))
    digest_seconds = time.perf_counter() - start
    quantized = sum(row.bytes for row in storage_table(loaded.model))
    files = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return {
        "checkpoint_bytes": sum(files),
        "largest_shard_bytes": max(files),
        "quantized_bytes": quantized,
        "bar_bytes": quantized + max(files),
        "peak_anonymous_bytes": sampler.peak - anonymous,
        "after_anonymous_bytes": status("RssAnon") - anonymous,
        "high_water_bytes": high_water,
        "imports_resident_bytes": resident,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(worked, 2),
        "digest_alone_seconds": round(digest_seconds, 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    from machine import describe_machine

    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), options.gigabytes)
        command = [sys.executable, __file__, "--measure", directory]
        child = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    if child.returncode:
        sys.exit(child.stderr)
    result = {"machine": describe_machine(), **json.loads(child.stdout.splitlines()[-1])}
    result["within_bar"] = max(result["peak_anonymous_bytes"], result["high_water_bytes"]) <= result["bar_bytes"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
