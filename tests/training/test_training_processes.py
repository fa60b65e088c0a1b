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
import sys, torch, training_setup as setup
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
for packing in (False, True):
    result, tensors = setup.run_training(
        Path(sys.argv[1]) / str(packing), train_rows=setup.rows(21, seed=7, longest=20), batch_size=2, epochs=2,
        packing=packing)
    save_file(tensors, f"{sys.argv[1]}/{packing}-rank{__import__('os').environ['RANK']}.safetensors")
"""


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """21 rows, so that the last windows are ragged and the processes never hold the same number of tokens."""
    processes = launch(EQUAL, str(tmp_path))
    rows = setup.rows(21, seed=7, longest=20)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 1/" in outputs[0] and "step 1/" not in outputs[1], "only rank 0 prints"
    for packing in (False, True):
        _, alone = setup.run_training(
            tmp_path / f"alone-{packing}", train_rows=rows, batch_size=4, epochs=2, packing=packing
        )
        ranks = [load_file(tmp_path / f"{packing}-rank{rank}.safetensors") for rank in range(2)]
        for name in alone:
            assert torch.equal(ranks[0][name], ranks[1][name])
            torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-4, atol=1e-6)
        curves = [read_metrics(tmp_path / name) for name in (str(packing), f"alone-{packing}")]
        for two, one in zip(*curves, strict=True):
            assert two.get("loss", two.get("eval_loss")) == pytest.approx(
                one.get("loss", one.get("eval_loss")), rel=1e-6
            )
            assert two.get("tokens") == one.get("tokens")


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
