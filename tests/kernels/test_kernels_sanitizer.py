"""No access past the ends on any shape: the kernels under sanitizers, and on buffers that end at a forbidden page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.kernels import native

SOURCES = sorted(map(str, (native.LIBRARY.parent / "csrc").glob("*.cpp")))
HERE = Path(__file__).parent
FLAGS = "-std=c++17 -O1 -g -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=off -fPIC -shared".split()
CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer".split()
ROUNDS = "20"


@pytest.fixture
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or sys.platform != "linux":
        pytest.skip("no C++ compiler")
    return found


def runtimes(compiler: str) -> list[str]:
    """What has to come first in a process that was not built with them: the sanitizer's allocator, and the C++ library,
    whose exceptions the sanitizer wraps. Empty where one is missing."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(Path(asked.stdout.strip()))
    return [str(path.resolve()) for path in found] if all(path.is_absolute() for path in found) else []


def drive(library: Path, preload: list[str]) -> None:
    environment = {
        **{key: value for key, value in os.environ.items() if key != "FINETUNE_CPU"},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(native.LIBRARY.parents[2]), os.environ.get("PYTHONPATH")])),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-X", "faulthandler", str(HERE / "sanitizer_driver.py"), str(library), ROUNDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[:6000]}"


@pytest.mark.slow
def test_odd_shapes_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    preload = runtimes(compiler)
    if not preload:
        pytest.skip("the C++ compiler has no AddressSanitizer")
    library = tmp_path / "checked.so"
    subprocess.run([compiler, *FLAGS, *CHECKS, "-o", str(library), *SOURCES], check=True)
    drive(library, preload)


@pytest.mark.slow
def test_odd_shapes_on_fenced_buffers(compiler: str, tmp_path: Path) -> None:
    """Masked loads and stores are no memory accesses to a sanitizer: the processor's own check sees them."""
    library, fence = tmp_path / "plain.so", tmp_path / "fence.so"
    subprocess.run([compiler, *FLAGS, "-o", str(library), *SOURCES], check=True)
    subprocess.run([compiler, *FLAGS, "-fvisibility=default", "-o", str(fence), str(HERE / "fence.cpp")], check=True)
    drive(library, [str(fence)])
