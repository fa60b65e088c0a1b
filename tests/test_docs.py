"""What the documents name is there: keys, configs, files, commands and sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import finetune as ft
from finetune.config import GROUPS, VERB_GROUPS, RunConfig
from finetune.data.config import DataConfig
from finetune.export.config import ExportConfig
from finetune.model.config import ModelConfig
from finetune.quant.distill import DistillConfig
from finetune.quantize.config import CalibrationConfig, QuantizeConfig
from finetune.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
SETTINGS: dict[str, list[Any]] = {
    **{group: list(registry.types().values()) for group, registry in (GROUPS | VERB_GROUPS).items()},
    "model": [ModelConfig],
    "data": [DataConfig, CalibrationConfig],
    "train": [TrainConfig],
    "export": [ExportConfig],
    "distill": [DistillConfig],
}
"""What may stand behind the name of a group."""
OWN = {"new-adapter": {"gain"}}
"""What a page makes up: that of a method that its reader adds."""
FILES = [*(ROOT / "benchmarks").rglob("*.json"), *(ROOT / "finetune").rglob("*.json")]
MADE = {path.name for path in FILES} | {
    "adapter_config.json", "config.json", "export.json", "finetune.json", "offsite.json", "quantization.json",
    "run.json",
}  # fmt: skip
"""Files that are in the repository, or in what runs and checkpoints leave."""


def code(page: Path) -> Iterator[str]:
    """Whatever a page shows as code."""
    text = page.read_text("utf-8")
    yield from re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_key_is_one(page: Path) -> None:
    known = {group: {f.name for kind in kinds for f in fields(kind)} for group, kinds in SETTINGS.items()}
    top = {f.name for kind in (RunConfig, QuantizeConfig) for f in fields(kind)}
    assert known.keys() <= top
    for text in code(page):
        for group, key in re.findall(r"(?<![\w./-])(\w+)\.(?!py|json|safetensors)(\w+)(?![\w(.])", text):
            assert key in known.get(group, {key}) | OWN.get(page.stem, set()), f"{page.name}: {group}.{key}"


def test_the_pages_show_code() -> None:
    """Or the tests around would hold of nothing."""
    shown = "\n".join(text for page in PAGES for text in code(page))
    keys = {match for match in re.findall(r"\b(\w+)\.\w+=", shown) if match in SETTINGS}
    assert keys >= {"adapter", "calibrator", "data", "export", "model", "pruner", "quant", "train"}
    assert "ft.LoRAConfig(" in shown and len(re.findall(r"python scripts/\w+\.py", shown)) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_config_can_be_made(page: Path) -> None:
    for text in code(page):
        for made in re.findall(r"ft\.\w+Config\([^()]*\)", text):
            if "path=" not in made:
                eval(made, {"ft": ft})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_section_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, section = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if section:
            headings = re.findall(r"^#+ (.+)$", other.read_text("utf-8"), re.MULTILINE)
            assert section in {slug(heading) for heading in headings}, f"{page.name}: {target}"
    for script in re.findall(r"python (scripts/\w+\.py)", text):
        assert (ROOT / script).is_file(), f"{page.name}: {script}"
    for result in re.findall(r"`(?:benchmarks/results/)?(\w+\.json)`[,;).]", text):
        assert result in MADE, f"{page.name}: {result}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
