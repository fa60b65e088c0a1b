"""Directories that appear whole or not at all, also when the writer is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.export.directory import ShardWriter, narrowed, published, sweep

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from finetune.export.directory import published, sweep
target = Path(sys.argv[1])
sweep(target.parent)
print("ready", flush=True)
for version in range(10**6):
    with published(target) as work:
        for part in range(5):
            (work / f"part-{part}").write_text(f"{version}" * 2000)
        (work / "parts").write_text(f"{version}")
"""


def whole(target: Path) -> bool:
    """Every part is there, complete, and of one version."""
    version = (target / "parts").read_text()
    return all((target / f"part-{part}").read_text() == version * 2000 for part in range(5))


def test_a_killed_writer_leaves_whole_directories_or_none(tmp_path: Path) -> None:
    target = tmp_path / "export" / "format"
    target.parent.mkdir()
    generator, seen = random.Random(0), 0
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(target), str(Path(__file__).parents[2])]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        assert {path.name for path in target.parent.iterdir() if not path.name.startswith(".tmp-")} <= {"format"}
        if target.exists():
            assert whole(target)
            seen += 1
    assert seen, "no writer ever came so far"
    sweep(target.parent)
    assert not list(target.parent.glob(".tmp-*"))


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "format"
    with published(target) as work:
        (work / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"), published(target) as work:
        (work / "file").write_text("new")
        raise OSError("disk full")
    assert (target / "file").read_text() == "old"
    with published(target) as work:
        (work / "other").write_text("new")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["format"]


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**6)
    writer.add("a", torch.arange(6.0).view(2, 3).T)
    writer.add("b", torch.ones(2, dtype=torch.uint8))
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(6.0).view(2, 3).T)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    for name, size in (("a", 10), ("huge", 100), ("b", 10), ("c", 10)):
        writer.add(name, torch.zeros(size))
    writer.finish()
    shards = [sorted(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert shards == [["a"], ["huge"], ["b", "c"]]


def test_narrowed_leaves_codes_alone() -> None:
    assert narrowed(torch.ones(1), torch.bfloat16).dtype == torch.bfloat16
    assert narrowed(torch.ones(1, dtype=torch.uint8), torch.bfloat16).dtype == torch.uint8


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "gone", 10**6)
    writer.add("a", torch.zeros(4))
    with pytest.raises(OSError, match=r"model-00001\.safetensors cannot be written"):
        writer.finish()
