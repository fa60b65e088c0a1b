"""Starting the processes that `accelerate launch --cpu --num_processes N` was asked for.

On CPUs accelerate's launcher starts N processes through MPI only; without it, it starts a single one and says nothing
(accelerate 1.15, `utils/launch.py: prepare_simple_launcher_cmd_env`). What was asked is visible: the launcher names a
master address for N > 1 and is our parent. So the one process it starts becomes the parent of N.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from finetune.errors import ConfigError

GRACE = 30.0
"""Seconds that processes get to save and stop after one of them has failed."""
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def asked_for() -> int:
    """How many processes this lone one should become; 1 where it is not what accelerate's CPU launcher left alone.

    Raises:
        ConfigError: when several were asked for and their number cannot be seen.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1") or "MASTER_ADDR" not in environment:
        return 1
    if "RANK" in environment or "WORLD_SIZE" in environment or any(name in environment for name in MPI_RANKS):
        return 1
    import psutil

    line = " ".join(psutil.Process(os.getppid()).cmdline())
    match = re.search(r"--num[_-]processes[= ](\d+)", line)
    if match is None:
        raise ConfigError(
            "accelerate was asked for several CPU processes and started one: give --num_processes on its command line, "
            "or use torchrun --nproc_per_node N train.py device=cpu ..."
        )
    return int(match[1])


def start(count: int) -> int:
    """Run this very command line as `count` processes on this machine; returns the first exit code that is not 0.

    A signal reaches all of them; when one fails the others are asked to stop, and killed after a grace period.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": port}
    command = [sys.executable, *sys.orig_argv[1:]]
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
    ]

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Until all are done; the first failure stops the others."""
    first, deadline = 0, None
    while any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.returncode), 0)
        if failed and deadline is None:
            first, deadline = failed, time.monotonic() + GRACE
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    code = first or next((process.returncode for process in processes if process.returncode), 0)
    return code if code >= 0 else 128 - code
