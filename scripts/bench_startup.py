"""How long a wrong command line takes to be told so: `python scripts/bench_startup.py`.

Runs `python train.py` once for each way in which a configuration can be wrong (and for --help), each several times in
turn, and writes benchmarks/results/startup.json: the command line, the shortest wall time, the CPU time of that run,
the exit code and the one line that was said. Wall time is what a user waits; on a machine that does other work as well
the CPU time beside it tells how much of the wait was ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
LIMIT = 3.0
"""Seconds of wall time."""


@dataclass
class Answer:
    """What one command line said, and when; seconds."""

    arguments: list[str]
    wall: float
    cpu: float
    exit_code: int
    message: str


def command_lines(folder: Path) -> list[list[str]]:
    """Every kind of mistake that needs no weights to be seen, with the files that some of them need."""
    files = {
        "empty.jsonl": b"",
        "latin.jsonl": '{"text": "caf\u00e9"}\n'.encode("latin-1"),
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "torn/config.json": b'{"model_type": "llama"}',
        "torn/tokenizer.json": b"{}",
        "torn/model.safetensors": b"\xff\x00\x00\x00\x00\x00\x00\x00{}",
        "pickle/config.json": b'{"model_type": "llama"}',
        "pickle/pytorch_model.bin": b"",
        "outside/config.json": b'{"model_type": "llama"}',
        "outside/model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}',
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "used").mkdir()
    (folder / "used" / "run.json").write_text("{}", "utf-8")
    mistakes = [
        "adapter.rnak=4", "+adapter.rnak=4", "quant=nf5", "+experiment=qlora_33", "train.batch_size=many",
        "train.batch_size=0", "adapter.rank=-1", "adapter.dropout=1", "device=gpu", "export.formats=[gguff]",
        "resume=nowhere", "model.path=/nowhere/at/all", f"model.path={folder}/torn", f"model.path={folder}/pickle",
        f"model.path={folder}/outside", "data.train=nowhere.jsonl", f"data.train={folder}/pointer.jsonl",
        f"data.train={folder}/empty.jsonl", f"data.train={folder}/latin.jsonl", "adapter.path=nowhere",
        "adapter.targets=[nope]", "adapter.rank=100000", "adapter.rank=200", "adapter.train_also=[nope]",
        "data.max_length=100000", "device=cuda:99", f"output_dir={folder}/used", f"output_dir={folder}/empty.jsonl/run",
    ]  # fmt: skip
    return [["--help"], *([mistake] for mistake in mistakes)]


def ask(arguments: list[str], folder: Path) -> Answer:
    """One run of train.py; its own CPU time by the difference in what children of this process have used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    # Should one of them be taken for right after all, it ends soon and leaves nothing behind.
    short = [] if arguments[0].startswith("resume") else ["train.max_steps=1", "export.formats=[]", "tracking=off"]
    output = [] if "output_dir" in arguments[0] or not short else [f"output_dir={folder}/run"]
    done = subprocess.run(
        [sys.executable, "train.py", *output, *short, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()[:1]
    shown = [argument.replace(str(folder), "DIR") for argument in arguments]
    return Answer(shown, round(wall, 2), round(cpu, 2), done.returncode, "\n".join(lines).replace(str(folder), "DIR"))


def main() -> None:
    """Measure, print a table, write the file; exit 1 where an answer took too long or was not one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        lines = command_lines(folder)
        seen = [[ask(line, folder) for line in lines] for _ in range(rounds)]
    best = [min(answers, key=lambda answer: answer.wall) for answers in zip(*seen, strict=True)]
    for answer in sorted(best, key=lambda answer: answer.wall):
        shown = " ".join(answer.arguments)
        print(
            f"{answer.wall:5.2f} s  {answer.cpu:5.2f} s CPU  exit {answer.exit_code}  {shown}: {answer.message[:110]}"
        )
    document = {
        "machine": describe_machine(),
        "limit_seconds": LIMIT,
        "rounds": rounds,
        "answers": list(map(asdict, best)),
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    wrong = [
        a for a in best if a.wall > LIMIT or "\n" in a.message or a.exit_code != (0 if "--help" in a.arguments else 2)
    ]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
