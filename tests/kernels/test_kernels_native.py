"""The compiled library: it loads, levels can be lowered, and its absence is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.kernels import native

needs_library = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))


@needs_library
def test_levels_can_be_lowered_and_come_back() -> None:
    before = native.level()
    for name in native.LEVELS:
        with native.at_most(name):
            assert native.LEVELS.index(native.level()) <= native.LEVELS.index(name)
    assert native.level() == before


@pytest.mark.parametrize(("asked", "said"), [("off", "FINETUNE_CPU=off"), ("avx1024", "expected off, scalar")])
def test_off_says_why(asked: str, said: str) -> None:
    code = "from finetune.kernels import native; print(native.level(), native.library(), native.why_off())"
    environment = {**os.environ, "FINETUNE_CPU": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("off None") and said in done.stdout


def test_a_library_of_another_version_is_not_called(tmp_path: Path) -> None:
    source, library = tmp_path / "old.cpp", tmp_path / "_native.so"
    source.write_text('extern "C" int ft_abi() { return -1; }\n', "utf-8")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    code = f"""
from pathlib import Path
from finetune.kernels import native
native.LIBRARY = Path({str(library)!r})
print(native.level(), native.why_off())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("off") and "interface -1, expected" in done.stdout
