"""The run directory: one writer, a record that is always whole, metrics that fit the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_setup as setup

from finetune.errors import RunError
from finetune.training import run_directory
from finetune.training.run_directory import (
    RunDirectory,
    check_output,
    read_metrics,
    read_record,
    require_space,
    shared_run,
)

ROOT = Path(__file__).parents[2]


def test_fresh_directories_never_clash(tmp_path: Path) -> None:
    runs = [RunDirectory.create("name", root=tmp_path) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == tmp_path / "name" for run in runs)
    record = read_record(runs[0].path)
    assert record["format_version"] == 1 and record["status"] == "running" and record["versions"]["torch"]


def test_a_directory_that_holds_a_run_names_resume(tmp_path: Path) -> None:
    RunDirectory.create("a", tmp_path / "run").close()
    with pytest.raises(RunError, match=rf"holds another run: .* resume={tmp_path / 'run'}"):
        RunDirectory.create("a", tmp_path / "run")


def test_in_use_until_the_process_dies(tmp_path: Path) -> None:
    program = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from finetune.training.run_directory import RunDirectory
run = RunDirectory.create("a", {str(tmp_path / "run")!r}); print("held", flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for opening in (lambda: RunDirectory.create("a", tmp_path / "run"), lambda: RunDirectory.resume(tmp_path / "run")):
        with pytest.raises(RunError, match="is in use by another run"):
            opening()
    process.kill()
    process.wait()
    run = RunDirectory.resume(tmp_path / "run")
    assert run.resumed and run.record["status"] == "running"


def test_what_can_be_said_early_is_what_creating_says(tmp_path: Path) -> None:
    """`check_output` makes nothing, and agrees with `create` on what cannot work."""
    (tmp_path / "file").write_text("in the way")
    run = RunDirectory.create("a", tmp_path / "run")
    for path, words in ((run.path, "is in use by another run"), (tmp_path / "file" / "run", "is not writable")):
        for complain in (lambda path=path: check_output(path), lambda path=path: RunDirectory.create("a", path)):
            with pytest.raises(RunError, match=words):
                complain()
    run.close()
    with pytest.raises(RunError, match=rf"holds another run: .* resume={run.path}"):
        check_output(run.path)
    RunDirectory.resume(run.path).close()
    before = sorted(tmp_path.rglob("*"))
    check_output(tmp_path / "new" / "run")
    check_output(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="is not writable"):
        RunDirectory.create("a", tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"cannot be created: .*; set output_dir="):
        RunDirectory.create("a", root=tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_not_writable_by_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="is not writable: Permission denied"):
        RunDirectory.create("a", tmp_path / "run")


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        RunDirectory.resume(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run.json"):
        RunDirectory.resume(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run.json cannot be read"):
        RunDirectory.resume(tmp_path)
    (tmp_path / "run.json").write_text('{"format_version": 7}')
    with pytest.raises(RunError, match=r"format_version 7, newer than 1"):
        RunDirectory.resume(tmp_path)


def test_the_sample_of_format_1_loads() -> None:
    sample = Path(__file__).parent / "run_v1"
    record = read_record(sample)
    assert record["status"] == "finished" and record["phases"]["train"]["seconds"] > 0
    assert [line["step"] for line in read_metrics(sample)] == [0, 1, 2, 2]


def test_status_and_notes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), RunDirectory.create("a", tmp_path / "run") as run:
        run.note("once")
        run.note("once")
        raise ValueError("boom\nmore")
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed" and record["error"] == "ValueError: boom" and record["notes"] == ["once"]
    with RunDirectory.resume(tmp_path / "run") as run:
        run.start()
        assert read_record(tmp_path / "run")["status"] == "running" and "error" not in run.record
        with pytest.raises(ValueError, match="perhaps"):
            run.update(status="perhaps")
        run.update(status="finished")
    assert read_record(tmp_path / "run")["status"] == "finished"


def test_phases_measure_time_and_anonymous_memory(tmp_path: Path) -> None:
    run = RunDirectory.create("a", tmp_path / "run")
    run.imports_done()
    with run.phase("load"):
        block = torch.ones(64 * 2**20 // 4)
        time.sleep(0.1)
        del block
    with run.phase("load"):
        time.sleep(0.05)
    measured = read_record(tmp_path / "run")["phases"]["load"]
    assert 0.15 <= measured["seconds"] < 5
    if sys.platform == "linux" and not torch.cuda.is_available():
        assert 60 * 2**20 < measured["peak_memory_bytes"] < 160 * 2**20


def test_a_phase_that_fails_is_measured_too(tmp_path: Path) -> None:
    run = RunDirectory.create("a", tmp_path / "run")
    with pytest.raises(ValueError, match="boom"), run.phase("train"):
        raise ValueError("boom")
    assert "train" in read_record(tmp_path / "run")["phases"]


def test_metrics_are_cut_to_a_step(tmp_path: Path) -> None:
    run = RunDirectory.create("a", tmp_path / "run")
    for step in (0, 1, 2, 2, 3):
        run.append_metrics({"step": step})
    with open(tmp_path / "run/metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    run.truncate_metrics(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        2,
    ]


def test_followers_write_nothing(tmp_path: Path) -> None:
    run = RunDirectory.follow(tmp_path)
    run.append_metrics({"step": 1})
    run.note("line")
    with run.phase("train"):
        pass
    run.update(status="finished")
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    require_space(tmp_path, 4_000_000, "the checkpoints of this run")
    with pytest.raises(RunError, match=r"has 5.0 MB free, but the checkpoints of this run need about 2.00 GB"):
        require_space(tmp_path, 2_000_000_000, "the checkpoints of this run")
    with pytest.raises(RunError, match=r"free some space, lower train.keep_checkpoints"):
        setup.run_training(tmp_path / "run", save_every=1, keep_checkpoints=40)


def test_an_error_of_rank_0_reaches_every_rank(tmp_path: Path) -> None:
    def fail() -> RunDirectory:
        raise RunError("no")

    with pytest.raises(RunError, match="no"):
        shared_run(SimpleNamespace(is_main_process=True, num_processes=1), fail)
