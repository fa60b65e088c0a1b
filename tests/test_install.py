"""What a user who only pip-installed has: the command from any folder, every YAML, the base, a conf/ of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_configs_and_base(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"finetune/conf/{path.relative_to(ROOT / 'conf')}" in names
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"):
        assert f"finetune/assets/tiny/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "conf/"))]


@pytest.mark.slow
def test_the_command_works_from_any_folder_with_conf_of_its_own(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    work = tmp_path / "work"
    (work / "conf" / "experiment").mkdir(parents=True)
    (work / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 7\n", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    entry = "from finetune.cli import main; main()"
    command = [sys.executable, "-c", entry, "train", "+experiment=mine", "--cfg", "job"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout and "block_size: 64" in done.stdout
