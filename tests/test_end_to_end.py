"""The commands a user runs, on the embedded base: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = [
    "+experiment=smoke",
    "tracking=off",
    "train.preflight=false",
    "export.formats=[]",
    "train.samples=0",
    "train.batch_size=2",
]


def train(*arguments: str, timeout: int = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("smoke") / "run"
    formats = "export.formats=[safetensors,bnb-nf4,peft]"
    return directory, train("+experiment=smoke", "train.sample_tokens=4", formats, f"output_dir={directory}")


def test_a_run_leaves_everything_it_promises(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, done = smoke
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(directory)
    record = json.loads((directory / "run.json").read_text("utf-8"))
    assert record["status"] == "finished" and record["best_eval"] < record["first_eval"]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.md",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/finetune.json",
        "adapter/chat_template.jinja",
    ):
        assert (directory / name).is_file(), name
    for name in ("safetensors", "bnb-nf4", "peft"):
        proof = json.loads((directory / "export" / name / "export.json").read_text("utf-8"))
        assert proof["passed"], proof
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    } <= set(next(line for line in lines if "loss" in line))


def test_a_finished_run_resumes_to_its_own_name(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, _ = smoke
    before = (directory / "run.json").read_bytes()
    done = train(f"resume={directory}")
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == str(directory)
    assert (directory / "run.json").read_bytes() == before


def test_another_run_s_directory_is_refused(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, _ = smoke
    done = train("+experiment=smoke", f"output_dir={directory}")
    assert done.returncode == 2 and f"resume={directory}" in done.stderr
    changed = train(f"resume={directory}", "adapter.rank=3")
    assert changed.returncode == 2 and "adapter.rank was 16 and would be 3" in changed.stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 short rows of a user's own."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}, or {i} twice."} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, rows: Path) -> None:
    settings = [*SHORT, f"data.train={rows}", "adapter.dropout=0.1", "data.packing=true", "train.max_steps=30"]
    straight = tmp_path / "straight"
    assert train(*settings, f"output_dir={straight}").returncode == 0
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "train.py", *settings, f"output_dir={cut}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(cut.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert json.loads((cut / "run.json").read_text("utf-8"))["status"] == "interrupted"
    done = train(f"resume={cut}")
    assert done.returncode == 0, done.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (cut / weights).read_bytes() == (straight / weights).read_bytes()
    losses = [
        [
            (line["step"], line.get("loss"), line.get("eval_loss"))
            for line in map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
        ]
        for run in (straight, cut)
    ]
    assert losses[0] == losses[1]


def test_a_sweep_makes_a_run_of_each_job_and_a_table(tmp_path: Path, rows: Path) -> None:
    """The second job fails (its rows do not exist); the third still runs."""
    short = [*SHORT, "train.max_steps=2", "train.eval_every=null", "train.save_every=null"]
    done = train(
        "-m",
        *short,
        f"data.train={rows},{tmp_path}/missing.jsonl,{rows}",
        f"output_dir={tmp_path}/run-${{hydra:job.num}}",
    )
    assert done.returncode == 2
    assert (tmp_path / "run-0" / "adapter").is_dir() and (tmp_path / "run-2" / "adapter").is_dir()
    assert "missing.jsonl" in done.stderr and "run directory" in done.stdout


def test_two_processes_launch(tmp_path: Path, rows: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "train.py",
        *SHORT,
        f"data.train={rows}",
        "train.max_steps=4",
        "train.eval_every=2",
        f"output_dir={tmp_path}/run",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, env={**os.environ, "MASTER_PORT": "29533"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["processes"] == 2


def test_the_headline_trains_on_a_cpu_with_another_base(tmp_path: Path) -> None:
    done = train(
        "+experiment=qlora_33b",
        "model.path=embedded",
        "data.train=pydocs",
        "train.max_steps=1",
        "data.max_length=96",
        "train.grad_accumulation=2",
        "train.eval_every=null",
        "train.samples=0",
        "export.formats=[]",
        "tracking=off",
        f"output_dir={tmp_path}/run",
    )
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["notes"]
    assert any("AdamW" in note for note in notes), notes


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of the README, word for word."""
    rows = [{"instruction": f"Say {i}", "output": f"I say {i}."} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text("utf-8")
    block = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "ft.export(" in block
    script = tmp_path / "block.py"
    script.write_text(block.replace("path-or-hub-id", "embedded"), "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "bnb-nf4" / "export.json").is_file()
