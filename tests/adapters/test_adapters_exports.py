"""What cannot be written of a method is said before anything is loaded; what can be set is shown in its YAML."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from adapters_models import frozen

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.houlsby import HoulsbyConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.adapters.stack import StackConfig
from finetune.checks import check_exports, export_formats
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


LEAVES_OUT = "export.formats=auto leaves out"
MERGED, NO_METHOD = "safetensors, bnb-nf4", "peft: PEFT has no such method"
WORDS = "it cannot be merged, because"
NO_WEIGHT = "what follows a sub-layer through an activation is no weight of it"
AUTOMATIC = {
    "lora": (LoRAConfig(), ["safetensors", "bnb-nf4", "peft"], ""),
    "houlsby": (
        HoulsbyConfig(),
        [],
        f"{LEAVES_OUT} {MERGED}: {WORDS} {NO_WEIGHT}; {NO_METHOD}",
    ),
    "bitfit": (
        BitFitConfig(),
        ["safetensors", "bnb-nf4"],
        f"{LEAVES_OUT} {NO_METHOD}",
    ),
    "stack": (
        StackConfig(parts=[{"name": "lora"}, {"name": "ia3"}]),
        ["safetensors", "bnb-nf4"],
        f"{LEAVES_OUT} peft: PEFT opens one adapter at a time; adapter/ has a directory for each part",
    ),
    "prompt": (
        PromptTuningConfig(),
        ["peft"],
        f"{LEAVES_OUT} {MERGED}: {WORDS} what stands before the text is no weight of the base",
    ),
}


@pytest.mark.parametrize("case", AUTOMATIC)
def test_auto_writes_what_the_method_can_be_written_as(case: str) -> None:
    config, formats, note = AUTOMATIC[case]
    adapter = attach(frozen("opt"), config)
    check_exports("auto", adapter)
    assert export_formats("auto", adapter) == (formats, note)
    assert export_formats(formats, adapter) == (formats, "")
    left = [name for name in ("safetensors", "bnb-nf4", "peft") if name not in formats]
    for name in left:
        with pytest.raises(ConfigError, match=rf"{name} cannot be written .*, or export.formats=auto"):
            export_formats([name], adapter)


def test_auto_is_the_default_and_a_word_is_no_list() -> None:
    assert to_run_config(compose_config([], CONF.parent)).export.formats == "auto"
    assert to_run_config(compose_config(["export.formats=[]"], CONF.parent)).export.formats == []
    for word, hint in (
        ("atuo", "did you mean 'auto'"),
        ("peft", r"did you mean \[peft\]"),
        ("3", "expected auto or a"),
    ):
        with pytest.raises(ConfigError, match=f"export.formats is .*{word}.*: expected auto or a list .*{hint}|{hint}"):
            compose_config([f"export.formats={word}"], CONF.parent)
