"""What `import finetune` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import finetune as ft
from finetune.adapters.base import ADAPTERS
from finetune.quant.base import QUANTIZERS


def test_every_public_name_and_every_method_is_there() -> None:
    for name in dir(ft):
        assert getattr(ft, name).__name__ == name
    for registry in (ADAPTERS, QUANTIZERS):
        for config in registry.types().values():
            assert getattr(ft, config.__name__) is config


def test_what_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoRaConfig'"):
        _ = ft.LoRaConfig


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, finetune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
