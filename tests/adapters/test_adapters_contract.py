"""The contract of every adapter: every check, on every method there is, over storage formats and families.

`make test` runs a cover in which every pair of check, method, format and family meets; `make test-all` the product.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters_checks import CHECKS, METHODS, Case, cases
from adapters_float64 import meetings
from adapters_models import FAMILIES, QUANTS, REFUSED, TINY, config_for, frozen, logits
from torch import Tensor

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS
from finetune.errors import UserError
from finetune.structure import inspect

FACTORS = (tuple(CHECKS), METHODS, tuple(QUANTS), FAMILIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method", "quant", "family"), cases(FACTORS))
def test_contract(name: str, method: str, quant: str, family: str, tmp_path: Path) -> None:
    CHECKS[name][0](Case(method, quant, family), tmp_path)


def test_what_a_family_cannot_carry_is_refused_in_one_line() -> None:
    for (method, family), words in REFUSED.items():
        if method in METHODS:
            model = frozen(family)
            before = list(model.state_dict())
            with pytest.raises(UserError, match=words) as raised:
                attach(model, config_for(ADAPTERS, method, family))
            assert "\n" not in str(raised.value)
            assert list(model.state_dict()) == before


def test_every_pair_is_in_the_cover() -> None:
    """By counting, not by how the cover is made."""
    marked = {tuple(case.values): bool(case.marks) for case in cases(FACTORS)}
    quick = [values for values, slow in marked.items() if not slow]
    for i in range(4):
        for j in range(i):
            assert {(v[j], v[i]) for v in marked} == {(v[j], v[i]) for v in quick}
    assert len(quick) <= 2 * len(CHECKS) * len(METHODS)
    assert {TINY[family][0] for family in FAMILIES} == {"CausalLM", "SequenceClassification", "Seq2SeqLM"}
    assert all(inspect(frozen(family)).stacks for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_activations_are_outliers_and_most_are_not(family: str) -> None:
    """Or the oracle of bases that round activations would not see both."""
    model = frozen(family, "int8")
    with meetings(model) as met:
        logits(model)
    shares = [_share(x) for x in met.values()]
    assert 0 < max(shares) and min(shares) < 1


def _share(x_BI: Tensor) -> float:
    """Which share of the columns holds a magnitude from the threshold on."""
    return float((x_BI.abs() >= 2).flatten(0, -2).any(dim=0).double().mean())
