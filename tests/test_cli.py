"""The command line from outside: exit codes, one line on stderr, help within its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapter.rnak=1"],
        ["+foo=1"],
        ["model.path=/nowhere/at/all"],
        ["data.train=nowhere.jsonl"],
        ["adapter.rank=0"],
        ["export.formats=[safetensor]"],
        ["resume=runs/nowhere"],
        ["adapter.path=nowhere"],
    ],
    ids=lambda a: a[0],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str]) -> None:
    done = command("train.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("finetune: "), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_help_shows_the_tree() -> None:
    done = command("train.py", "--help")
    assert done.returncode == 0 and "block_size" in done.stdout


def test_verbs() -> None:
    done = command("-m", "finetune", "--help")
    assert done.returncode == 0 and "doctor" in done.stdout
    wrong = command("-m", "finetune", "docter")
    assert wrong.returncode == 2 and "did you mean 'doctor'?" in wrong.stderr


def test_doctor_is_ready_to_paste() -> None:
    done = command("-m", "finetune", "doctor")
    assert done.returncode == 0
    for word in ("torch:", "bitsandbytes:", "cuda: ", "Weights & Biases:"):
        assert word in done.stdout


def test_doctor_says_what_would_be_adapted() -> None:
    done = command("-m", "finetune", "doctor", "model.path=embedded")
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj: linear 256 -> 256" in done.stdout
