"""docs/new-adapter.md is kept true: its code is installed as a plug-in, trained with and put through the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "new-adapter.md").read_text("utf-8")

TRAIN = """
import dataclasses
import torch
from adapters_models import frozen, ids, logits
from pathlib import Path
from finetune.errors import ModelError
from finetune.adapters.attach import attach
from finetune.compose import compose_config
from finetune.config import to_run_config

overrides = ["adapter=scale", "adapter.targets=[down_proj]", "adapter.gain=2.0"]
config = to_run_config(compose_config(overrides, Path("conf").resolve(), ["{configs}"])).adapter
assert (type(config).__name__, config.gain, config.targets) == ("ScaleConfig", 2.0, ["down_proj"])
model = frozen("llama", "nf4")
before = logits(model)
adapter = attach(model, config)
assert torch.equal(logits(model), before)
assert sorted(adapter.trainable()) == [f"model.layers.{{i}}.mlp.down_proj.scale" for i in (0, 1)]
optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=0.05)
losses = []
for _ in range(2):
    loss = model(ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
assert losses[1] < losses[0], losses
adapter.save(Path("{directory}") / "saved")
config.path = "{directory}/saved"
attach(frozen("llama", "nf4"), config)
config.gain = 3.0
try:
    attach(frozen("llama", "nf4"), config)
except ModelError as error:
    assert "has gain 2.0, but here it is 3.0" in str(error)
else:
    raise AssertionError("another gain was accepted")
keys = set(f.name for f in dataclasses.fields(config)) - {{"name"}}
assert keys == set({keys}), keys
print("trained", losses)
"""


def block(name: str, language: str) -> str:
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n```{language}\n(.*?)```", GUIDE, re.DOTALL)
    assert found, f"docs/new-adapter.md has no block for {name}"
    return found[1]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The guide's files as an installed package with an entry point."""
    (tmp_path / "scale.py").write_text(block("scale.py", "python"))
    info = tmp_path / "scale-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scale\nVersion: 1.0\n")
    entry = re.search(r'entry-points\."(finetune\.plugins)"\]\n\s*(scale) = "(\w+)"', GUIDE)
    assert entry
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2]} = {entry[3]}\n")
    configs = tmp_path / "configs" / "adapter"
    configs.mkdir(parents=True)
    (configs / "scale.yaml").write_text(block("scale.yaml", "yaml"))
    return tmp_path


def run(installed: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(installed), str(ROOT), str(ROOT / "tests" / "adapters")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_example_trains_as_a_plug_in_chosen_by_its_yaml(installed: Path) -> None:
    keys = sorted(set(re.findall(r"^(\w+):", block("scale.yaml", "yaml"), re.MULTILINE)) - {"defaults"})
    code = TRAIN.format(configs=installed / "configs", directory=installed, keys=keys)
    assert "trained" in run(installed, "-c", code)


def test_the_example_keeps_the_contract_of_every_adapter(installed: Path) -> None:
    quick = ["-q", "-m", "not slow", "-k", "scale"]
    out = run(installed, "-m", "pytest", *quick, "tests/adapters/test_adapters_contract.py")
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 13  # one of each check, at the least
    assert "failed" not in out and "skipped" not in out


def test_the_example_is_formatted_like_the_house() -> None:
    assert max(map(len, block("scale.py", "python").splitlines())) <= 120
    assert len(block("scale.py", "python").splitlines()) <= 65
