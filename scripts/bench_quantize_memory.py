"""Measure the memory of a calibration: `python scripts/bench_quantize_memory.py --gigabytes 2`.

Writes a random Llama checkpoint of that size to a temporary directory (as scripts/bench_load.py does), quantizes it
with GPTQ to int4 in groups of 128 in a fresh process, and notes how far memory rose above what the imports took:
anonymous pages (what the process holds of its own, sampled), and the high-water mark of the resident set (mapped pages
of the checkpoint and of finished blocks included, which the system takes back when it needs them). The bar is 700 MB of
anonymous pages. Writes benchmarks/results/quantize_memory.json. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_load import Sampler, status, write_checkpoint  # noqa: E402
from machine import describe_machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quantize_memory.json"
BAR = 700_000_000
WORDS = 32000


def measure(directory: Path, pieces: int, length: int) -> dict[str, Any]:
    """Quantize the checkpoint in this process, which should have done nothing before."""
    import torch

    import finetune.quant.driver
    import finetune.quantize.opening  # noqa: F401  (imported before the baseline is taken)
    from finetune.cli import quantize
    from finetune.quant.base import QUANTIZERS
    from finetune.quant.rounders.base import CALIBRATORS

    QUANTIZERS.scan()
    CALIBRATORS.scan()
    torch.set_num_threads(1)  # on a machine that others use, threads that wait for one another would be what is timed
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    anonymous, resident = status("RssAnon"), status("VmRSS")
    sampler = Sampler()
    sampler.start()
    start, worked = time.perf_counter(), time.process_time()
    base, output = directory / "base", directory / "output"
    code = quantize(
        [
            f"model.path={base}",
            f"output={output}",
            "device=cpu",
            "quant=int4",
            "quant.group_size=128",
            "calibrator=gptq",
            f"data.calibration={directory / 'text.jsonl'}",
            f"data.samples={pieces}",
            f"data.max_length={length}",
        ]
    )
    if code:
        sys.exit(code)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    sampler.done.set()
    sampler.join()
    record = json.loads((output / "quantization.json").read_text("utf-8"))
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    return {
        "checkpoint_bytes": sum(files),
        "bar_bytes": BAR,
        "peak_anonymous_bytes": sampler.peak - anonymous,
        "high_water_bytes": status("VmHWM") - resident,
        "imports_resident_bytes": resident,
        "output_bytes": record["bytes"],
        "calibration_tokens": record["calibration_tokens"],
        "evaluation_tokens": (record["quality"] or {}).get("tokens", 0),
        "layers": len(record["layers"]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(worked, 1),
        "threads": torch.get_num_threads(),
    }


def write_tokenizer(directory: Path) -> None:
    """One that takes words apart, unlike that of `write_checkpoint`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def write_text(path: Path, pieces: int, length: int) -> None:
    """Random words of the checkpoint's vocabulary, with a tenth more to measure on."""
    draw = random.Random(0)
    rows = [" ".join(f"w{draw.randrange(1, WORDS)}" for _ in range(length)) for _ in range(pieces * 10 // 9 + 1)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--pieces", type=int, default=16, help="of text to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="on the state of the machine, e.g. that others used it")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.pieces, options.length)))
        return
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "base").mkdir()
        write_checkpoint(directory / "base", options.gigabytes)
        write_tokenizer(directory / "base")
        write_text(directory / "text.jsonl", options.pieces, options.length)
        sizes = ["--pieces", str(options.pieces), "--length", str(options.length)]
        command = [sys.executable, __file__, "--measure", place, *sizes]
        child = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    if child.returncode:
        sys.exit(child.returncode)
    result = {"machine": describe_machine(), "note": options.note, **json.loads(child.stdout.splitlines()[-1])}
    result["within_bar"] = result["peak_anonymous_bytes"] <= BAR
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
