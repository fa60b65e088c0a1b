"""What llm-compressor makes of the same layer and inputs: the vectors that scripts/make_vectors.py wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from finetune.quant.affine_grid import AffineGrid
from finetune.quant.pruners.sparsegpt import SparseGPT, SparseGPTConfig
from finetune.quant.rounders.base import squared
from finetune.quant.rounders.gptq import GPTQ, GPTQConfig

FILE = Path(__file__).parent / "vectors" / "llmcompressor.safetensors"
with safe_open(FILE, "pt") as file:
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}
    FACTS = json.loads(file.metadata()["facts"])
SETTINGS: dict[str, dict[str, Any]] = FACTS["settings"]
WEIGHT_OI, INPUTS_NI = TENSORS["weight"].float(), TENSORS["inputs"].float()
GRAM_II = INPUTS_NI.T @ INPUTS_NI


def names(method: str) -> list[str]:
    return [name for name in SETTINGS if name.startswith(method)]


def error(left_OI: Tensor) -> float:
    gram_II = INPUTS_NI.double().T @ INPUTS_NI.double()
    return squared((WEIGHT_OI - left_OI).double(), gram_II) / squared(WEIGHT_OI.double(), gram_II)


def grid(name: str) -> AffineGrid:
    """Theirs."""
    setting = SETTINGS[name]
    return AffineGrid(TENSORS[f"{name}.scale"], TENSORS.get(f"{name}.zero"), setting["num_bits"], setting["group_size"])


@pytest.mark.parametrize("name", names("gptq"))
def test_the_range_of_a_group_is_theirs(name: str) -> None:
    """Ours is rounded to float16, as it is stored, before a code is chosen."""
    theirs = grid(name)
    symmetric = SETTINGS[name]["symmetric"]
    ours = AffineGrid.fit(WEIGHT_OI, theirs.bits, theirs.group_size, symmetric=symmetric, zero_point="integer")
    torch.testing.assert_close(ours.scale_OG.float(), theirs.scale_OG, rtol=6e-4, atol=0)
    if theirs.zero_OG is not None:
        assert ours.zero_OG is not None and torch.equal(ours.zero_OG, theirs.zero_OG)


@pytest.mark.parametrize("name", names("gptq"))
def test_gptq_chooses_their_codes(name: str) -> None:
    theirs = grid(name)
    choice = GPTQ(GPTQConfig(act_order="actorder" in SETTINGS[name])).choose(theirs, WEIGHT_OI, GRAM_II)
    assert choice is not None and choice.damping == 0.01
    assert (choice.codes_OI == TENSORS[f"{name}.codes"]).float().mean() >= 0.999
    reached, wanted = error(theirs.decode(choice.codes_OI)), float(TENSORS[f"{name}.error"])
    assert error(theirs.decode(TENSORS[f"{name}.codes"])) == pytest.approx(wanted, rel=1e-5)
    assert reached <= 1.01 * wanted
    assert error(theirs.decode(theirs.round_columns(WEIGHT_OI, 0))) >= 2.0 * reached


@pytest.mark.parametrize("name", names("sparsegpt"))
def test_sparsegpt_keeps_what_they_keep(name: str) -> None:
    setting = SETTINGS[name]
    pattern = f"{setting['prune_n']}:{setting['prune_m']}" if setting["prune_m"] else None
    pruned = SparseGPT(SparseGPTConfig(sparsity=setting["sparsity"], pattern=pattern)).prune(WEIGHT_OI, GRAM_II)
    assert (pruned.kept_OI == TENSORS[f"{name}.kept"].bool()).float().mean() >= 0.999
    assert error(pruned.w_OI) <= 1.01 * float(TENSORS[f"{name}.error"])
