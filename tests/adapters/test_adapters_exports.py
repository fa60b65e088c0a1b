"""What cannot be written of a method is said before anything is loaded; what can be set is shown in its YAML."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from adapters_models import frozen

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.ia3 import IA3Config
from finetune.checks import check_exports
from finetune.compose import compose_config
from finetune.config import to_run_config
from finetune.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf" / "adapter"


def test_what_has_no_place_in_the_base_is_not_merged() -> None:
    adapter = attach(frozen("llama"), BitFitConfig(bias="all", targets=["q_proj"]))
    words = (
        r"export.formats: safetensors cannot be written of adapter=bitfit: it cannot be merged, because the layout of"
        r" the base has no bias for q_proj; set export.formats=\[\]"
    )
    with pytest.raises(ConfigError, match=words):
        check_exports(["safetensors", "peft"], adapter)
    check_exports([], adapter)


def test_what_peft_does_not_have_is_not_written_for_it() -> None:
    adapter = attach(frozen("opt"), BitFitConfig())
    with pytest.raises(ConfigError, match=r"peft cannot be written .*: PEFT has no such method; set export.formats="):
        check_exports(["safetensors", "peft"], adapter)
    check_exports(["safetensors"], adapter)
    check_exports(["safetensors", "bnb-nf4", "peft"], attach(frozen("llama"), IA3Config()))


OURS = {name: kind for name, kind in ADAPTERS.types().items() if kind.__module__.startswith("finetune.")}


@pytest.mark.parametrize("method", OURS)
def test_every_setting_is_shown_with_its_default(method: str) -> None:
    lines = (CONF / f"{method}.yaml").read_text("utf-8").splitlines()
    shown = {line.partition(":")[0] for line in lines if line[:1].isalpha()} - {"defaults"}
    assert shown == {field.name for field in fields(OURS[method])} - {"name"}
    assert to_run_config(compose_config([f"adapter={method}"], CONF.parent)).adapter == OURS[method]()
