"""What `inspect` finds, on tiny random models of many families, with weights and on meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure import Structure, inspect

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EIGHT_HEADS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
MOE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]

FAMILIES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "Llama": (SMALL, LLAMA, False),
    "Mistral": (SMALL, LLAMA, False),
    "Qwen2": (SMALL, LLAMA, False),
    "Qwen3": (SMALL | {"head_dim": 16}, LLAMA, False),
    "Gemma": (SMALL | {"head_dim": 16}, LLAMA, True),
    "Gemma2": (SMALL | {"head_dim": 16}, LLAMA, True),
    "Phi": (SMALL, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], False),
    "Phi3": (SMALL, ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"], False),
    "Falcon": (EIGHT_HEADS | {"num_hidden_layers": 2}, FUSED, True),
    "Bloom": (EIGHT_HEADS | {"n_layer": 2, "n_head": 4}, FUSED, True),
    "OPT": (
        EIGHT_HEADS | {"ffn_dim": 96, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
        True,
    ),
    "GPT2": (
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}, ["c_attn", "c_proj", "c_fc", "c_proj"], True,
    ),
    "GPTNeoX": (EIGHT_HEADS | {"intermediate_size": 96, "num_hidden_layers": 2}, FUSED, False),
    "Mixtral": (SMALL | {"num_local_experts": 4}, MOE, False),
    "Qwen2Moe": (
        SMALL | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1}, [*MOE, "gate_proj", "up_proj", "down_proj"], False,
    ),
    "GptOss": (SMALL | {"num_local_experts": 4, "head_dim": 16}, MOE, False),
}  # fmt: skip


def build(family: str, device: str = "cpu") -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0])
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_projection(family: str) -> None:
    _, leaves, tied = FAMILIES[family]
    model = build(family)
    structure = inspect(model)
    assert len(structure.blocks) == 2
    assert [p.leaf for p in structure.projections if p.block == 0] == leaves
    assert [p.leaf for p in structure.projections if p.block == 1] == leaves
    assert structure.tied is tied
    assert model.get_submodule(structure.head) is model.get_output_embeddings()
    assert model.get_submodule(structure.embeddings) is model.get_input_embeddings()
    for projection in structure.projections:
        assert projection.name.startswith(structure.blocks[projection.block] + ".")


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_says_the_same(family: str) -> None:
    assert inspect(build(family, "meta")) == inspect(build(family))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "Qwen2Moe", "GptOss", "Falcon"])
def test_a_frozen_model_has_the_structure_of_the_dense_one(family: str) -> None:
    model = build(family)
    before = inspect(model)
    freeze(model, NF4Config(), before)
    after = inspect(model)
    assert set(after.projections) == set(before.projections)
    assert (after.blocks, after.head, after.embeddings, after.tied) == (
        before.blocks,
        before.head,
        before.embeddings,
        before.tied,
    )


def test_shapes_are_those_of_the_map_whatever_the_memory() -> None:
    found = {p.leaf: p for p in inspect(build("GPT2")).projections if p.block == 0}
    c_attn = found["c_attn"]
    assert (c_attn.kind, c_attn.in_features, c_attn.out_features, c_attn.transposed) == ("conv1d", 64, 192, True)
    oss = {p.leaf: p for p in inspect(build("GptOss")).projections}
    assert (oss["gate_up_proj"].in_features, oss["gate_up_proj"].out_features) == (64, 192)
    assert (oss["down_proj"].in_features, oss["down_proj"].out_features, oss["down_proj"].experts) == (96, 64, 4)
    assert oss["gate_up_proj"].transposed and oss["down_proj"].transposed
    mixtral = {p.leaf: p for p in inspect(build("Mixtral")).projections}
    assert (mixtral["gate_up_proj"].in_features, mixtral["gate_up_proj"].out_features) == (64, 192)
    assert not mixtral["down_proj"].transposed


def test_routers_and_gates_are_no_projections() -> None:
    names = [p.name for p in inspect(build("Qwen2Moe")).projections]
    assert any("shared_expert.down_proj" in name for name in names)
    assert not any(name.endswith(("shared_expert_gate", "mlp.gate", "router")) for name in names)


class _ListedExperts(nn.Module):
    """Experts as a list of MLPs with a linear router, as older remote code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)) for _ in range(3))
        self.shared = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16))


def test_experts_in_a_list_keep_their_linear_router() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_ListedExperts() for _ in range(2))

    structure = inspect(Model())
    assert structure.blocks == ("layers.0", "layers.1")
    names = [p.name for p in structure.projections if p.block == 0]
    assert "layers.0.router" not in names
    assert len(names) == 8
    assert (structure.head, structure.embeddings, structure.tied) == (None, None, False)


def test_a_wrapped_projection_counts_once() -> None:
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.lora_A = nn.Linear(base.in_features, 2, bias=False)

        def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
            return self.base.weight.to(dtype)

    model = build("Llama")
    before = inspect(model)
    for projection in before.projections:
        model.set_submodule(projection.name, Wrapper(model.get_submodule(projection.name)))
    assert inspect(model) == before


def test_a_model_without_blocks_has_no_projections() -> None:
    assert inspect(nn.Sequential(nn.Linear(4, 4))) == Structure((), (), None, None, False)
