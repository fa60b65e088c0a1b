"""Checkpoints appear whole or not at all, and only whole ones are trusted."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from finetune import atomic
from finetune.errors import RunError
from finetune.training import checkpoint

GROUPS = {"parameters": {"w": torch.arange(6.0).view(2, 3)}, "random": {"cpu": torch.zeros(4, dtype=torch.uint8)}}


def write(directory: Path, step: int) -> Path:
    return checkpoint.write(directory, step, GROUPS, {"loop": {"step": step}})


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 200)
    assert path.name == "step-00000200"
    checkpoint.check(path)
    assert torch.equal(checkpoint.read_tensors(path, "parameters")["w"], GROUPS["parameters"]["w"])
    assert checkpoint.read_state(path)["loop"] == {"step": 200}
    assert {entry.name for entry in path.iterdir()} == {
        "manifest.json",
        "parameters.safetensors",
        "random.safetensors",
        "state.json",
    }


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "parameters.safetensors", 20),
    "one bit": lambda path: _flip(path / "parameters.safetensors"),
    "file missing": lambda path: (path / "random.safetensors").unlink(),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: os.truncate(path / "manifest.json", 30),
    "manifest empty": lambda path: (path / "manifest.json").write_text("{}"),
    "state cut": lambda path: os.truncate(path / "state.json", 3),
    "empty": lambda path: [entry.unlink() for entry in list(path.iterdir())],
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_one_is_taken(tmp_path: Path, damage: str) -> None:
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    DAMAGES[damage](new)
    newest, skipped = checkpoint.newest_valid(tmp_path)
    assert newest == old
    assert len(skipped) == 1 and "step-00000002" in skipped[0]


def test_the_sample_of_format_1_loads() -> None:
    newest, skipped = checkpoint.newest_valid(Path(__file__).parent / "run_v1/checkpoints")
    assert newest is not None and newest.name == "step-00000002" and not skipped
    assert checkpoint.read_state(newest)["loop"]["step"] == 2
    assert torch.equal(checkpoint.read_tensors(newest, "parameters")["w"], GROUPS["parameters"]["w"])


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "nowhere") == (None, [])


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(RunError, match=r"step-00000001 has format_version 99, newer than 1"):
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_full_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Whichever write or sync it is that fails."""
    old = write(tmp_path, 1)
    calls = 0

    def failing(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return wrapped

    for name in ("save_file", "fsync", "_write_json", "publish"):
        monkeypatch.setattr(checkpoint, name, failing(getattr(checkpoint, name)))
    try:
        write(tmp_path, 2)
    except RunError as error:
        assert "No space left" in str(error) and "step-00000002" in str(error) and "\n" not in str(error)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001"]
        assert checkpoint.newest_valid(tmp_path) == (old, [])
    else:
        assert calls < call, "an error was swallowed"


def test_rotation_spares_the_best_and_the_last_valid(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    DAMAGES["truncated"](tmp_path / "step-00000006")
    checkpoint.rotate(tmp_path, 2, {1})
    assert [path.name[-1] for path in checkpoint.listed(tmp_path)] == ["1", "4", "5", "6"]
    DAMAGES["truncated"](tmp_path / "step-00000005")
    checkpoint.rotate(tmp_path, 1, set())
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-00000004"


def test_what_was_refused_may_be_written_anew(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    DAMAGES["truncated"](path)
    write(tmp_path, 1)
    checkpoint.check(path)


def test_a_rename_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    with pytest.raises(FileExistsError):
        atomic.publish(tmp_path / "new", tmp_path / "old")


def test_a_rename_never_replaces_where_the_system_cannot_promise_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_SYMBOL", "no_such_call")
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    with pytest.raises(FileExistsError):
        atomic.publish(tmp_path / "new", tmp_path / "old")
    atomic.publish(tmp_path / "new", tmp_path / "other")
    assert (tmp_path / "other").is_dir()


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000003").mkdir()
    (tmp_path / ".tmp-step-00000003" / "parameters.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-run.json").write_text("{")
    assert atomic.clean_leftovers(tmp_path) == [".tmp-run.json", ".tmp-step-00000003"]
    assert list(tmp_path.iterdir()) == []
