"""Two processes compute what one computes with the doubled batch, and share their fate."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_setup as setup
from safetensors.torch import load_file

from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.run_directory import read_metrics

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(program: str, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """What `accelerate launch --cpu --num_processes 2` starts, without the launcher."""
    port = str(free_port())
    shared = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/training'}:{os.environ.get('PYTHONPATH', '')}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


EQUAL = """
import os, sys, torch, test_training_processes as here
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
for packing in (False, True):
    for optim in here.OPTIMIZERS:
        tensors = here.learn(Path(sys.argv[1]) / f"two-{packing}-{optim}", packing, optim, batch_size=2)
        save_file(tensors, f"{sys.argv[1]}/{packing}-{optim}-rank{os.environ['RANK']}.safetensors")
"""
OPTIMIZERS = {
    "adamw": (AdamWConfig(), 1e-2),
    # So large an eps makes Adam's update linear in the gradients: what is compared is what the processes summed.
    "linear": (AdamWConfig(eps=100.0), 100.0),
}


def learn(directory: Path, packing: bool, optim: str, **settings: int) -> dict[str, torch.Tensor]:
    """Two epochs over 21 rows, so that the last windows are ragged and processes never hold equally many tokens."""
    config, rate = OPTIMIZERS[optim]
    rows = setup.rows(21, seed=7, longest=20)
    _, tensors = setup.run_training(
        directory, train_rows=rows, epochs=2, packing=packing, optim=config, learning_rate=rate, **settings
    )
    return tensors


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The distance of all weights as one vector, relative to its length; they start at zero."""
    a, b = (torch.cat([t[name].double().flatten() for name in sorted(wanted)]) for t in (found, wanted))
    return float((a - b).norm() / b.norm())


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Bit for bit with the doubled accumulation, and as near as float32 sums allow with the doubled batch.

    A matrix product over four rows adds up in another order than two over two rows, in one process as in two.
    """
    processes = launch(EQUAL, str(tmp_path))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 1/" in outputs[0] and "step 1/" not in outputs[1], "only rank 0 prints"
    for packing in (False, True):
        for optim in OPTIMIZERS:
            what = f"{packing}-{optim}"
            ranks = [load_file(tmp_path / f"{what}-rank{rank}.safetensors") for rank in range(2)]
            twice = learn(tmp_path / f"accumulated-{what}", packing, optim, batch_size=2, grad_accumulation=2)
            double = learn(tmp_path / f"batch-{what}", packing, optim, batch_size=4)
            for name in twice:
                assert torch.equal(ranks[0][name], ranks[1][name]) and torch.equal(ranks[0][name], twice[name])
            assert apart(ranks[0], double) < 1e-6
            two, same, other = (read_metrics(tmp_path / f"{kind}-{what}") for kind in ("two", "accumulated", "batch"))
            for key in ("loss", "eval_loss", "grad_norm", "tokens"):
                values = [[line[key] for line in lines if line.get(key) is not None] for lines in (two, same, other)]
                assert values[0] == values[1] == pytest.approx(values[2], rel=1e-6)


FAIL = """
import os, sys, torch, training_setup as setup
from pathlib import Path
from finetune.training.objectives.sft import SFTConfig, build
torch.set_num_threads(1)
model = setup.tiny_model()
class Failing:
    note, inner, calls = None, build(SFTConfig(), model), 0
    def loss_sum(self, batch):
        self.calls += torch.is_grad_enabled()
        if os.environ["RANK"] == "1" and self.calls == 3:
            raise ValueError("the cause")
        return self.inner.loss_sum(batch)
setup.run_training(Path(sys.argv[1]) / "run", model=model, objective=Failing(), epochs=50)
"""


def test_an_error_on_one_process_stops_all(tmp_path: Path) -> None:
    processes = launch(FAIL, str(tmp_path))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode not in (0, None) for process in processes)
    assert "ValueError: the cause" in outputs[1]
    assert "RunError: another process of this run failed" in outputs[0]


SIGNAL = """
import os, sys, time, signal, threading, torch, training_setup as setup
from pathlib import Path
torch.set_num_threads(1)
if os.environ["RANK"] == "1":
    def later():
        while not (Path(sys.argv[1]) / "run/metrics.jsonl").exists(): time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=later, daemon=True).start()
result, _ = setup.run_training(Path(sys.argv[1]) / "run", epochs=5000)
print("status", result.status, result.signal, result.steps)
"""


def test_a_signal_on_one_process_stops_all(tmp_path: Path) -> None:
    processes = launch(SIGNAL, str(tmp_path))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    lines = [output.strip().splitlines()[-1].split() for output in outputs]
    assert [line[:2] for line in lines] == [["status", "interrupted"]] * 2, outputs
    assert lines[1][2] == str(int(signal.SIGTERM)) and lines[0][3] == lines[1][3]
    assert (tmp_path / "run/checkpoints" / f"step-{int(lines[0][3]):08d}" / "manifest.json").exists()
