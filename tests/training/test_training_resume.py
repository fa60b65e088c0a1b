"""A run that is stopped and continued is, bit for bit, the run that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_setup as setup
from safetensors.torch import load_file

from finetune.errors import RunError
from finetune.training import checkpoint
from finetune.training.held_out import HeldOut
from finetune.training.run_directory import read_metrics

ROOT = Path(__file__).parents[2]
TIMES = ("tokens_per_second", "peak_memory_bytes")


def curve(directory: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(directory)]


def last_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    newest, skipped = checkpoint.newest_valid(directory / "checkpoints")
    assert newest is not None and not skipped
    return {
        f"{stem}/{name}": tensor
        for stem in ("parameters", "optimizer", "random")
        for name, tensor in checkpoint.read_tensors(newest, stem).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    first, second = last_checkpoint(one), last_checkpoint(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Stop(Exception):
    pass


class StopAt:
    """A tracker that ends the process's work at a log line, as a crash would: between log and checkpoint."""

    run_id = "the-run"
    note = None

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, metrics, step):
        if step == self.step and "loss" in metrics:
            raise Stop

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


SETTINGS = dict(epochs=2, grad_accumulation=2, batch_size=3, dropout=0.2, eval_every=3, save_every=2, log_every=1)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("stops", [[1], [5], [3, 6], [4, 5, 9]], ids=str)
def test_resume_is_bit_exact(tmp_path: Path, packing: bool, optim: str, stops: list[int]) -> None:
    from finetune.training.config import OPTIMIZERS

    settings = dict(SETTINGS, packing=packing, optim=OPTIMIZERS.type_of(optim)())
    if packing:
        settings["batch_size"] = 1
    _, whole = setup.run_training(tmp_path / "whole", **settings, tracker=StopAt(-1))
    for stop in stops:
        with pytest.raises(Stop):
            torch.manual_seed(random.randrange(10**6))
            setup.run_training(tmp_path / "parts", **settings, tracker=StopAt(stop))
    _, parts = setup.run_training(tmp_path / "parts", **settings, tracker=StopAt(-1))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_log_windows_survive(tmp_path: Path) -> None:
    """A loss averaged over steps before and after the stop."""
    settings = dict(SETTINGS, log_every=5, save_every=3, max_steps=11)
    setup.run_training(tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        setup.run_training(tmp_path / "parts", **settings, tracker=StopAt(10))
    setup.run_training(tmp_path / "parts", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(directory: Path, **settings) -> subprocess.Popen:
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/training/training_setup.py"), str(directory), *pairs]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(directory: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(read_metrics(directory)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: int) -> None:
    settings = dict(SETTINGS, epochs=40, save_every=None)
    process = start(tmp_path / "run", **settings)
    wait_for_lines(tmp_path / "run", 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert "status interrupted" in output
    newest, skipped = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    assert newest is not None and not skipped
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert checkpoint.step_of(newest) == steps[-1], "nothing of what was learnt is lost"


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """The script whose long run is committed, with a few kills."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "scripts/kill_resume.py"), "--kills", "6", "--seed", "7", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] >= 6 and result["runs_bit_exact"] == result["runs"]
    assert result["invalid_checkpoints_chosen"] == 0


def test_a_damaged_checkpoint_is_skipped_by_name_and_an_older_one_taken(tmp_path: Path) -> None:
    settings = dict(SETTINGS, max_steps=8, keep_checkpoints=5)
    setup.run_training(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    damaged = tmp_path / "parts/checkpoints/step-00000008/parameters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result, _ = setup.run_training(tmp_path / "parts", **settings)
    assert any("step-00000008/parameters.safetensors has" in note for note in result.notes)
    assert "resumed from step-00000006" in result.notes
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first, one = setup.run_training(tmp_path / "run", **SETTINGS)
    before = curve(tmp_path / "run")
    second, other = setup.run_training(tmp_path / "run", **SETTINGS)
    assert before == curve(tmp_path / "run") and second.steps == first.steps and second.last_eval == first.last_eval
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_steps_may_be_asked_for(tmp_path: Path) -> None:
    setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=4))
    result, _ = setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=7))
    assert result.steps == 7
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]


def test_another_thread_count_is_said(tmp_path: Path) -> None:
    setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=2))
    torch.set_num_threads(2)
    result, _ = setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=3))
    assert any("2 threads after 1" in note for note in result.notes)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=2))
    newest, _ = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    manifest = json.loads((newest / "manifest.json").read_text())
    tensors = load_file(newest / "parameters.safetensors")
    checkpoint.write(newest.parent, 3, {"parameters": {"other": next(iter(tensors.values()))}}, {"loop": {}})
    assert manifest
    with pytest.raises(RunError, match=r"does not hold what this run trains"):
        setup.run_training(tmp_path / "run", **dict(SETTINGS, max_steps=4))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Held-out losses in the order in which they are measured; the last one stays."""
    losses = [5.0, 4.0, 3.0, 3.5, 3.2, 3.6]
    monkeypatch.setattr(HeldOut, "loss", lambda self, signals: losses.pop(0) if len(losses) > 1 else losses[0])
    return losses


def test_the_best_weights_are_kept(tmp_path: Path, scripted: list[float]) -> None:
    """What is handed back is the best, which rotation has spared."""
    settings = dict(SETTINGS, epochs=3, eval_every=2, keep_checkpoints=1)
    result, tensors = setup.run_training(tmp_path / "run", **settings)
    evals = {line["step"]: line["eval_loss"] for line in curve(tmp_path / "run") if "eval_loss" in line}
    best = min((step for step in evals if step), key=lambda step: evals[step])
    assert best == 4 and result.best_step == best and result.best_eval == evals[best]
    stored = checkpoint.read_tensors(tmp_path / f"run/checkpoints/step-{best:08d}", "parameters")
    assert all(torch.equal(tensors[name], stored[name]) for name in tensors)
    assert json.loads((tmp_path / "run/run.json").read_text())["best"] == {"step": best, "eval_loss": evals[best]}


def test_early_stopping(tmp_path: Path, scripted: list[float]) -> None:
    settings = dict(SETTINGS, epochs=3, eval_every=1, early_stopping=3)
    result, _ = setup.run_training(tmp_path / "run", **settings)
    assert result.status == "stopped_early" and result.steps == 5 and result.best_step == 2
    again, _ = setup.run_training(tmp_path / "run", **settings)
    assert again.status == "stopped_early" and again.steps == result.steps
