"""The same contract on many more families, none of which the product knows: every method meets every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters_checks import CHECKS, METHODS, Case, cases
from adapters_models import FAMILIES, TINY

OTHERS = tuple(family for family in TINY if family not in FAMILIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method", "quant", "family"), cases((tuple(CHECKS), METHODS, ("dense", "nf4"), OTHERS))
)
def test_family(name: str, method: str, quant: str, family: str, tmp_path: Path) -> None:
    CHECKS[name][0](Case(method, quant, family), tmp_path)
