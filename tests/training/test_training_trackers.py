"""Weights & Biases gets everything, and can never stop a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_setup as setup
import wandb
import yaml

from finetune.errors import ConfigError
from finetune.training.config import TRACKERS
from finetune.training.run_directory import RunDirectory
from finetune.training.trackers.off import OffConfig
from finetune.training.trackers.wandb import WandbConfig, build, resolved_mode

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class FakeRun:
    """Stands for wandb's run: records, or fails."""

    id, url, dir = "abc123", "https://example.test/run", "/somewhere/files"

    def __init__(self) -> None:
        self.lines: list = []
        self.broken = False
        self.summary: dict = {}
        self.artifacts: list = []
        self.exit_code = None

    def log(self, values, step=None):
        if self.broken:
            raise ConnectionError("no route\nto host")
        self.lines.append((step, values))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(run=FakeRun(), init={})

    def init(**settings):
        seen.init = settings
        return seen.run

    monkeypatch.setattr(wandb, "init", init)
    return seen


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolved_mode(WandbConfig()) == "offline"
    assert resolved_mode(WandbConfig(mode="online")) == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    assert resolved_mode(WandbConfig()) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolved_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved_mode(WandbConfig()) == "disabled"
    assert resolved_mode(WandbConfig(mode="offline")) == "offline"
    with pytest.raises(ConfigError, match=r"did you mean 'offline'"):
        WandbConfig(mode="ofline")


def test_everything_arrives(tmp_path: Path, fake: SimpleNamespace) -> None:
    run = RunDirectory.create("a", tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("train:\n  learning_rate: 0.1\n")
    tracker = build(WandbConfig(project="p", group="g", tags=["t"], log_adapter=True), run)
    assert fake.init["config"] == {"train": {"learning_rate": 0.1}}
    assert (fake.init["project"], fake.init["group"], fake.init["tags"], fake.init["mode"]) == (
        "p",
        "g",
        ["t"],
        "offline",
    )
    assert tracker.run_id == "abc123" and run.record["tracker_id"] == "abc123" and "wandb sync" in tracker.note
    setup.run_training(tmp_path / "inner", max_steps=3, tracker=tracker)
    assert [step for step, _ in fake.run.lines] == [0, 1, 2, 3, 3]
    tracker.table("samples", ["prompt", "before", "after"], [["a", "b", "c"]])
    assert fake.run.lines[-1][1]["samples"].data == [["a", "b", "c"]]
    tracker.summary({"peft/kl_mean": 0.1})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    tracker.artifact(tmp_path / "adapter", "adapter")
    tracker.finish(0)
    assert fake.run.summary == {"peft/kl_mean": 0.1} and len(fake.run.artifacts) == 1 and fake.run.exit_code == 0


def test_an_artifact_only_on_request(tmp_path: Path, fake: SimpleNamespace) -> None:
    build(WandbConfig(), RunDirectory.create("a", tmp_path / "run")).artifact(tmp_path, "adapter")
    assert fake.run.artifacts == []


def test_resume_continues_the_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    with RunDirectory.create("a", tmp_path / "run") as run:
        build(WandbConfig(), run)
        assert fake.init["id"] is None and fake.init["resume"] is None
    with RunDirectory.resume(tmp_path / "run") as run:
        build(WandbConfig(), run)
    assert fake.init["id"] == "abc123" and fake.init["resume"] == "allow"


def test_a_sweep_names_the_project(tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    build(WandbConfig(project="mine"), RunDirectory.create("a", tmp_path / "run"))
    assert fake.init["project"] is None and fake.init["id"] is None


def test_a_failure_is_said_once_and_the_run_goes_on(
    tmp_path: Path, fake: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = build(WandbConfig(), RunDirectory.create("a", tmp_path / "run"))
    fake.run.broken = True
    result, _ = setup.run_training(tmp_path / "inner", max_steps=4, tracker=tracker)
    assert result.status == "finished"
    tracker.table("samples", ["a"], [["b"]])
    tracker.finish(0)
    assert capsys.readouterr().err == "tracking stopped, the run goes on: ConnectionError: no route\n"


def test_a_tracker_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**settings):
        raise wandb.errors.CommError("no space\nleft")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = build(WandbConfig(mode="offline"), RunDirectory.create("a", tmp_path / "run"))
    tracker.log({"step": 1}, 1)
    tracker.finish(1)
    assert tracker.run_id is None and capsys.readouterr().err.count("\n") == 1


def test_a_server_that_does_not_answer_makes_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens on that port; a key is there, so `auto` means online."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    before = time.monotonic()
    tracker = build(WandbConfig(project="p"), RunDirectory.create("a", tmp_path / "run"))
    result, _ = setup.run_training(tmp_path / "inner", max_steps=2, tracker=tracker)
    tracker.finish(0)
    assert result.status == "finished" and time.monotonic() - before < 60
    assert "wandb cannot be reached, tracking offline: CommError: " in capsys.readouterr().err
    assert tracker.note is not None and "wandb offline" in tracker.note
    assert list((tmp_path / "run/wandb").glob(f"offline-run-*/run-{tracker.run_id}.wandb"))


def test_other_ranks_track_nothing(tmp_path: Path, fake: SimpleNamespace) -> None:
    build(WandbConfig(), RunDirectory.follow(tmp_path)).log({"step": 1}, 1)
    assert fake.init == {}


def test_off(tmp_path: Path) -> None:
    tracker = TRACKERS.build(OffConfig(), RunDirectory.follow(tmp_path))
    tracker.log({"step": 1}, 1)
    tracker.finish(0)
    assert tracker.run_id is None


def test_offline_for_real_and_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = build(WandbConfig(project="p"), RunDirectory.create("a", tmp_path / "run"))
    tracker.log({"step": 1, "loss": 2.0}, 1)
    tracker.table("samples", ["prompt"], [["x"]])
    tracker.finish(0)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    output = capfd.readouterr()
    assert output.out == "" and output.err == ""


AGENT = """
import json, os, sys
from wandb.wandb_agent import Agent
agent = Agent(None, None, sweep_id=os.environ["WANDB_SWEEP_ID"])
agent._sweep_command = json.loads(sys.argv[1])
answer = agent._process_command(json.loads(sys.argv[2]))
assert "exception" not in answer, answer
sys.exit(agent._run_processes["abc123"].wait())
"""


def test_an_agent_starts_a_run_of_a_sweep(tmp_path: Path) -> None:
    """The documented sweep, started by wandb's own agent; what the server would have answered is given to it.

    The agent turns the parameters into the command line and names sweep and run in the environment; offline, so that
    no server has to take the run.
    """
    text = (ROOT / "docs" / "tracking.md").read_text("utf-8")
    sweep = yaml.safe_load(text.partition("<!-- file: sweep.yaml -->\n```yaml\n")[2].partition("```")[0])
    assert sweep["metric"]["name"] == "eval_loss"
    chosen = {"adapter.rank": 4, "adapter.targets": ["q_proj", "v_proj"], "train.learning_rate": 0.0005}
    assert set(chosen) == set(sweep["parameters"])
    order = {
        "type": "run",
        "run_id": "abc123",
        "program": sweep["program"],
        "args": {key: {"value": value} for key, value in chosen.items()},
    }
    command = [
        *sweep["command"],
        "train.max_steps=2",
        "train.samples=0",
        f"data.train={tmp_path}/rows.jsonl",
        f"output_dir={tmp_path}/run",
    ]
    rows = [{"prompt": f"What is {n}?", "completion": f"It is the number {n}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        [sys.executable, "-c", AGENT, json.dumps(command), json.dumps(order)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (record["status"], record["tracker_id"]) == ("finished", "abc123")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))
    assert config["adapter"]["rank"] == 4 and config["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert config["train"]["learning_rate"] == 0.0005
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-abc123.wandb")
    stored = kept.read_bytes()
    assert b"sweep1" in stored and b"eval_loss" in stored
