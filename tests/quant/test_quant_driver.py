"""The sequential driver: calls replayed, groups found, later blocks calibrated on quantized earlier ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from finetune.quant import driver, settled
from finetune.quant.affine import Int2Config, Int3Config, Int4Config
from finetune.quant.base import FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig, DenseLinear
from finetune.quant.driver import Driver
from finetune.quant.freeze import freeze
from finetune.quant.gram import Gram
from finetune.quant.nf4 import NF4Config
from finetune.quant.recipe import Recipe
from finetune.quant.replay import reading_alike, record, run
from finetune.quant.resident import Resident
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.rounders.rtn import RTN
from finetune.quant.settled import Settled
from finetune.structure import inspect
from finetune.structure.base import Projection

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32
    ),
    "falcon": FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}


def model_of(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def batches_of(count: int = 2, rows: int = 4, length: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"input_ids": torch.randint(1, 96, (rows, length), generator=generator), "use_cache": False}
        for _ in range(count)
    ]


def frozen(family: str) -> tuple[Any, Any]:
    model = model_of(family)
    structure = inspect(model)
    freeze(model, DenseConfig(), structure)
    return model, structure


@pytest.mark.parametrize("family", CONFIGS)
def test_a_block_alone_does_what_it_does_in_the_model(family: str) -> None:
    model, structure = frozen(family)
    batches = batches_of()
    outputs: list[list[torch.Tensor]] = [[] for _ in structure.blocks]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, i=i: outputs[i].append(out[0] if isinstance(out, tuple) else out)
        )
        for i, name in enumerate(structure.blocks)
    ]
    calls = record(model, structure.blocks, batches)
    for handle in handles:
        handle.remove()
    assert calls.chained == [False, True]
    hidden = calls.hidden
    for number, name in enumerate(structure.blocks):
        block = model.get_submodule(name)
        hidden = [run(block, x, call) for x, call in zip(hidden, calls.arguments[number], strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(hidden, outputs[number], strict=True))


GROUPS = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "qwen3": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "falcon": [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}],
    "mixtral": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
}


@pytest.mark.parametrize("family", GROUPS)
def test_projections_are_grouped_by_what_they_read(family: str) -> None:
    model, structure = frozen(family)
    calls = record(model, structure.blocks, batches_of(1))
    block = model.get_submodule(structure.blocks[0])
    projections = [p for p in structure.projections if p.block == 0]
    found = reading_alike(model, projections, lambda: run(block, calls.hidden[0], calls.arguments[0][0]))
    assert [{name.rpartition(".")[2] for name in group.names} for group in found] == GROUPS[family]
    assert all(group.once for group in found) == (family != "mixtral")


def test_a_block_is_run_as_far_as_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the attention's output does not wait for the rest; the same bits come out."""
    states, batches, used = [], batches_of(4, 8), []
    for enough in (True, False):
        if not enough:
            monkeypatch.setattr(
                driver, "reading_alike", lambda *args: [r._replace(once=False) for r in reading_alike(*args)]
            )
        model = model_of("llama")
        name = f"{inspect(model).blocks[0]}.mlp.act_fn"
        times: list[int] = []
        model.get_submodule(name).register_forward_hook(lambda *_, times=times: times.append(1))
        Driver(model, inspect(model), Recipe(Int4Config(group_size=32), GPTQ()), batches).go()
        used.append(len(times))
        states.append(model.state_dict())
    # In the model, once to see who reads what, for the one group of four that needs it; all four and the last run.
    assert used == [1 + 2 * len(batches), 1 + 6 * len(batches)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_finished_part_is_run_no_more(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its last projection reads is kept; the same bits come out, and every module is in its place."""
    states, names, kept = [], [], []
    keep = Resident.keep
    monkeypatch.setattr(Resident, "keep", lambda *args: kept.append(args[1]) or keep(*args))
    for keeping in (True, False):
        if not keeping:
            monkeypatch.setattr(settled, "MOST_BYTES", -1)
        model = model_of(family)
        model.set_attn_implementation("sdpa")  # which puts out no weights of attention
        Driver(model, inspect(model), Recipe(Int4Config(group_size=32), GPTQ()), batches_of(3, 8)).go()
        states.append(model.state_dict())
        names.append([name for name, _ in model.named_modules()])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1]) and names[0] == names[1]
    assert "read0" in kept


class Part(nn.Module):
    """Two projections; puts out something beside hidden states where it is given."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.a, self.b, self.beside, self.times = nn.Linear(4, 4), nn.Linear(4, 4), beside, 0

    def forward(self, x: torch.Tensor) -> Any:
        self.times += 1
        return self.b(self.a(x)), self.beside


class PartOften(nn.Module):
    """A block that calls its part so many times."""

    def __init__(self, calls: int, beside: Any) -> None:
        super().__init__()
        self.part, self.calls = Part(beside), calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = self.part(x)[0]
        return x


@pytest.mark.parametrize(("calls", "beside", "kept"), [(1, None, True), (2, None, False), (1, torch.ones(1), False)])
def test_what_is_called_twice_or_puts_out_something_beside_is_run_each_time(
    calls: int, beside: Any, kept: bool
) -> None:
    block, x = PartOften(calls, beside), torch.ones(2, 3, 4)
    part, wanted = block.part, block(x)
    names = ["block.part.a", "block.part.b"]
    parts = Settled(block, "block", names, lambda: iter([block(x)]), 1, lambda _, hidden: list(hidden))
    parts.rehearse()
    parts.gather(names[1])
    parts.done(names[1:])
    assert block.part is part  # one of its projections may still change
    parts.done(names)
    times = part.times
    for _ in range(2):
        assert torch.equal(next(parts.run()), wanted)
    assert (part.times == times) == kept
    parts.undo()
    assert block.part is part


def test_a_projection_that_is_used_twice_is_seen_to_be() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x))

    model = Twice()
    projections = [Projection("linear", "linear", 4, 4)]
    (found,) = reading_alike(model, projections, lambda: model(torch.ones(2, 4)))
    assert found.names == ["linear"] and not found.once


@pytest.mark.parametrize("width", [5, 256, 700])
def test_the_second_moment_is_summed_in_panels(width: int) -> None:
    parts = torch.randn(3, 2, 20, width, generator=torch.Generator().manual_seed(0)).unbind()
    seen = Gram()
    for number, part in enumerate(parts, 1):
        seen.add(part)
        x_NI = torch.cat(parts[:number]).view(-1, width).double()
        assert seen.matrix_II is not None and torch.equal(seen.matrix_II, seen.matrix_II.T)
        torch.testing.assert_close(seen.matrix_II.double(), x_NI.T @ x_NI, rtol=1e-4, atol=1e-4)
    assert seen.samples == 120


@pytest.mark.parametrize("config", [Int3Config(group_size=32), NF4Config(block_size=32)], ids=lambda c: c.name)
@pytest.mark.parametrize("family", CONFIGS)
def test_gptq_loses_less_than_rtn(family: str, config: QuantConfig) -> None:
    reference, batches = model_of(family), batches_of(4, 8)
    with torch.no_grad():
        wanted = torch.cat([reference(**batch).logits for batch in batches])
    lost = {}
    for name, rounder in (("rtn", RTN()), ("gptq", GPTQ())):
        model = model_of(family)
        layers = Driver(model, inspect(model), Recipe(config, rounder), batches).go()
        assert [layer.name for layer in layers] == [p.name for p in inspect(model).projections]
        assert all(isinstance(model.get_submodule(layer.name), FrozenWeight) for layer in layers)
        assert not any(isinstance(model.get_submodule(layer.name), DenseLinear) for layer in layers)
        assert all(0 < layer.error <= layer.error_rtn and layer.samples > 0 for layer in layers)
        with torch.no_grad():
            lost[name] = float((torch.cat([model(**batch).logits for batch in batches]) - wanted).square().mean())
    assert lost["gptq"] < 0.9 * lost["rtn"], lost


def test_later_layers_see_what_the_quantized_earlier_ones_put_out() -> None:
    """The gram of every projection is that of the inputs it has in the finished model."""
    model, batches = model_of("llama"), batches_of()
    seen: dict[str, torch.Tensor] = {}

    class Spy(GPTQ):
        def choose(self, grid, w_OI, gram_II):  # type: ignore[no-untyped-def]
            seen[names[len(seen)]] = gram_II
            return super().choose(grid, w_OI, gram_II)

    names = [p.name for p in inspect(model).projections]
    Driver(model, inspect(model), Recipe(Int2Config(group_size=32), Spy()), batches).go()
    finished: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, n=name: finished.__setitem__(
                n, finished.get(n, 0) + args[0].flatten(0, 1).T @ args[0].flatten(0, 1)
            )
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for name in names:
        torch.testing.assert_close(seen[name], finished[name], rtol=1e-4, atol=1e-4)


def test_experts_that_saw_no_tokens_are_reported() -> None:
    model = model_of("mixtral")
    one_token = [{"input_ids": torch.tensor([[5]]), "use_cache": False}]
    layers = Driver(model, inspect(model), Recipe(Int3Config(group_size=32), GPTQ()), one_token).go()
    stacked = [layer for layer in layers if "experts" in layer.name]
    assert stacked and all(layer.unseen == 2 and "2 of its experts: saw no inputs" in layer.note for layer in stacked)
    assert all(layer.unseen == 0 for layer in layers if "experts" not in layer.name)


def test_without_rows_it_rounds_to_nearest_as_freezing_does() -> None:
    model, frozen_model = model_of("gpt2"), model_of("gpt2")
    freeze(frozen_model, NF4Config(), inspect(frozen_model))
    layers = Driver(model, inspect(model), Recipe(NF4Config())).go()
    ours, theirs = model.state_dict(), frozen_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(layer.samples == 0 and not layer.note for layer in layers)


def test_an_encoder_and_its_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    batches = [{"input_ids": torch.randint(1, 96, (4, 12)), "labels": torch.randint(1, 96, (4, 9)), "use_cache": False}]
    layers = Driver(model, inspect(model), Recipe(Int3Config(group_size=32), GPTQ()), batches).go()
    assert all(layer.samples in (36, 48) for layer in layers)
    assert any("decoder" in layer.name for layer in layers) and any("encoder" in layer.name for layer in layers)
    assert sum(layer.error < 0.8 * layer.error_rtn for layer in layers) > len(layers) / 2
