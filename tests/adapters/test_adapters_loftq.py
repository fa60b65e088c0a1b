"""LoftQ: the alternation of PEFT and of the paper, over bitsandbytes' own codes, and what is saved of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, logits, randomize
from test_adapters_pissa import as_stored, off, started, stored

from finetune.adapters.attach import attach
from finetune.adapters.loftq import LoftQConfig
from finetune.adapters.lora import LoRAConfig
from finetune.checks import check_exports
from finetune.quant.base import FrozenLinear

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "model.layers.0.mlp.gate_proj"
"""64 inputs: where blocks do not divide them, bitsandbytes decodes wrongly on CPUs with AVX-512."""


def as_in_peft(weight: torch.Tensor, rank: int, rounds: int):
    """peft 0.21 `utils/loftq_utils.py`, `loftq_init` with 4 bits, which asks for an accelerator, on the CPU."""
    functional = pytest.importorskip("bitsandbytes").functional
    rest = weight.clone()
    for number in range(rounds):
        codes, state = functional.quantize_4bit(
            rest.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        decoded = functional.dequantize_4bit(codes, state)
        u, s, v = torch.linalg.svd(weight - decoded, full_matrices=False)
        left, right = u @ torch.sqrt(torch.diag(s)[:, :rank]), torch.sqrt(torch.diag(s)[:rank]) @ v
        if number + 1 < rounds:
            rest = weight - left @ right
    return codes, decoded, right, left


@pytest.mark.parametrize("rounds", [1, 2])
def test_codes_and_factors_are_those_of_peft(rounds: int) -> None:
    config = LoftQConfig(rank=8, alpha=8.0, iterations=rounds, niter=None)
    dense, _, adapter = started("llama", "nf4", config)
    module, weight = adapter.adapted[NAME], dense.get_submodule(NAME).weight.detach()
    codes, decoded, a, b = as_in_peft(weight, 8, rounds)
    same = (module.stored.weight == codes).float().mean()
    assert same == 1 if rounds == 1 else same > 0.97  # a code on a border may fall to its other side
    bar = 1e-4 if rounds == 1 else 0.05
    mine = module.lora_B.weight @ module.lora_A.weight
    assert (mine - b @ a).norm() <= bar * (b @ a).norm()
    merged = module.merge(module.dequantize(torch.float32))
    assert (merged - (decoded + b @ a)).norm() <= bar * (weight - decoded).norm()


@pytest.mark.parametrize(("family", "quant"), [("llama", "int3"), ("gpt2", "nf4"), ("mixtral", "nf4")])
def test_every_round_comes_nearer_and_one_leaves_the_base(family: str, quant: str, tmp_path: Path) -> None:
    errors = []
    for iterations in (1, 2, 5):
        dense, model, adapter = started(family, quant, LoftQConfig(rank=8, iterations=iterations))
        errors.append(off(dense, dict(adapter.merged())))
        assert bool(adapter.residuals) == adapter.keeps_start == (iterations > 1)
        assert adapter.in_peft == (iterations == 1)
        plain = stored(family, quant)[1]
        with adapter.disabled():
            assert torch.equal(bits(logits(model)), bits(logits(plain)))
        if iterations == 1:
            assert not torch.equal(logits(model), logits(plain))
            for name, tensor in plain.state_dict().items():
                with adapter.detached():
                    assert torch.equal(model.state_dict()[name], tensor)
    before = off(dense, as_stored(dense, quant))
    assert errors[2] < errors[1] < errors[0] < 0.95 * before, (before, errors)


def test_after_one_round_it_is_a_plain_lora_that_peft_reads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, model, originals = stored("llama", "nf4")
    torch.manual_seed(3)
    adapter = attach(model, LoftQConfig(rank=4), originals)
    randomize(adapter)
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    check_exports(["peft", "safetensors"], adapter)
    for config in (LoftQConfig(path=str(tmp_path)), LoRAConfig(path=str(tmp_path))):
        other = stored("llama", "nf4")[1]
        attach(other, config)
        assert torch.equal(bits(logits(other)), bits(logits(model)))
    with adapter.detached():
        state = {name: module.dequantize(torch.float32) for name, module in model.named_modules()
                 if isinstance(module, FrozenLinear)}  # fmt: skip
        twin = dense_twin("llama")
        twin.load_state_dict({n: p for n, p in model.state_dict().items() if n in twin.state_dict()
                              and p.is_floating_point()}, strict=False)  # fmt: skip
    for name, weight in state.items():
        twin.get_submodule(name).weight.data.copy_(weight)
    theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= 2e-5


def test_where_nothing_was_lost_or_nothing_is_known_of_it_it_is_lora() -> None:
    for quant in ("dense", "nf4"):
        starts = []
        for config in (LoftQConfig(rank=4), LoRAConfig(rank=4)):
            model = frozen("llama", quant)
            torch.manual_seed(3)
            adapter = attach(model, config)
            starts.append(dict(adapter.trainable()))
        assert torch.equal(bits(logits(model)), bits(logits(frozen("llama", quant))))
        assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())
    note = attach(frozen("llama", "nf4"), LoftQConfig(rank=4)).note
    assert note == (
        "adapter=loftq: model.layers.0.self_attn.q_proj and 13 more cannot be read as before quantization: it starts"
        " there as LoRA"
    )
