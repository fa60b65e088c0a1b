"""Nothing assumes a CPU: a run on a device whose tensors refuse to meet the CPU's. See pretend_device.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_run_keeps_its_tensors_on_one_device(tmp_path: Path) -> None:
    program = Path(__file__).with_name("pretend_device.py")
    # The compiled kernels read memory, which tensors of this device do not have.
    environment = {**os.environ, "FINETUNE_CPU": "off", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(program), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert said["trained"] == "2 4 True"
    assert said["answered"] == "2"
    assert said["calibrated"] == said["requantized"] == "pretend"
    assert said["merged"] == "{'pretend'}"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
