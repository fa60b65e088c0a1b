"""The command line from outside: exit codes, one line on stderr, help within its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.startup import SPINS

ROOT = Path(__file__).parents[1]


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


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
        ["adapter.rank=100000"],
        ["adapter.targets=[nope]"],
        ["data.max_length=100000"],
    ],
    ids=lambda a: a[0],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str]) -> None:
    done = command("train.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("finetune: "), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_names_go_into_an_empty_mapping() -> None:
    done = command("train.py", "data.columns={prompt: question, completion: answer}", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "    prompt: question\n    completion: answer\n" in done.stdout


def test_help_shows_choices_and_values() -> None:
    done = command("train.py", "adapter.rank=5", "--help")
    assert done.returncode == 0, done.stderr
    choices = {line.partition("=")[0].strip(): line for line in done.stdout.splitlines() if "=" in line}
    assert "qlora_33b" in choices["+experiment"] and "lora" in choices["adapter"] and "nf4" in choices["quant"]
    assert "    block_size: 64" in done.stdout and "    rank: 5" in done.stdout
    assert "schema" not in done.stdout


def test_help_names_a_mistake_beside_it() -> None:
    done = command("train.py", "adapter.rnak=5", "--help")
    assert done.returncode == 2 and "did you mean 'rank'" in done.stderr


def test_what_is_known_at_once_is_said_before_hydra_or_a_model_library_starts() -> None:
    """Each of these takes seconds to import or start."""
    code = (
        "import sys; from pathlib import Path; import finetune.cli as cli; import finetune.startup as startup\n"
        "startup.leave = sys.exit\n"
        "def entry(): raise AssertionError('Hydra was started')\n"
        "sys.argv = ['train.py', 'adapter.rank=100000']\n"
        "try: cli.launch(entry, Path('conf'))\nexcept SystemExit as stop: assert stop.code == 2, stop\n"
        "heavy = {'transformers', 'accelerate', 'datasets', 'bitsandbytes', 'wandb', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    assert "adapter.rank is 100000" in done.stderr


def test_verbs() -> None:
    done = command("-m", "finetune", "--help")
    assert done.returncode == 0 and "doctor" in done.stdout
    wrong = command("-m", "finetune", "docter")
    assert wrong.returncode == 2 and "did you mean 'doctor'?" in wrong.stderr


@pytest.mark.parametrize("arguments", [["-m", "finetune", "doctor"], ["train.py", "adapter.rank=100000"]], ids=str)
def test_idle_threads_of_openmp_sleep_soon(arguments: list[str]) -> None:
    """Spinning for milliseconds, they take the cores from other work and from each other."""

    def spins(**environment: str) -> list[str]:
        told = command(*arguments, OMP_DISPLAY_ENV="VERBOSE", **environment).stderr
        return [line.split("=")[1].strip(" '") for line in told.splitlines() if "GOMP_SPINCOUNT" in line]

    if not (default := spins()):
        pytest.skip("torch's OpenMP is not GNU's here")
    assert set(default) == {SPINS} and set(spins(GOMP_SPINCOUNT="77")) == {"77"}
    assert SPINS not in spins(OMP_WAIT_POLICY="active"), "what is asked for is left alone"


def test_doctor_is_ready_to_paste() -> None:
    done = command("-m", "finetune", "doctor")
    assert done.returncode == 0
    for word in ("torch:", "bitsandbytes:", "cuda: ", "Weights & Biases:"):
        assert word in done.stdout


def test_doctor_says_what_would_be_adapted() -> None:
    done = command("-m", "finetune", "doctor", "model.path=embedded")
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj: linear 256 -> 256" in done.stdout
