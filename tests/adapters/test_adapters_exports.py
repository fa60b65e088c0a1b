"""What cannot be written of a method is said before anything is loaded."""

from __future__ import annotations

import pytest
from adapters_models import frozen

from finetune.adapters.attach import attach
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.ia3 import IA3Config
from finetune.checks import check_exports
from finetune.errors import ConfigError


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
