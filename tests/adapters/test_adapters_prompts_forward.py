"""Virtual tokens in forward and backward passes: each row reads what it reads alone, padded or packed, and gradients
are those of a float64 model written out here."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from adapters_models import dense_twin, ids
from adapters_prompts import CASES, L, attached, each, padded, rows_of
from torch import Tensor, nn


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_padded_row_reads_what_it_reads_alone(kind: str, family: str) -> None:
    model, _ = attached(kind, family)
    tokens, alone = ids(), ids()[1:, 3:]
    with torch.no_grad():
        wanted = model(alone).logits
        right = torch.cat([alone, torch.zeros_like(alone[:, :3])], 1)
        found = model(torch.cat([tokens[:1], right]), attention_mask=padded("right")).logits[1:, :8]
        assert (found - wanted).abs().max() <= 1e-4
        mask = padded("left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        takes = "position_ids" in inspect.signature(model.forward).parameters
        found = model(tokens, attention_mask=mask, **({"position_ids": positions} if takes else {})).logits[1:, 3:]
        assert (found - wanted).abs().max() <= 1e-4


@each
@pytest.mark.parametrize("attention", ["eager", "sdpa", "finetune"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_rows_read_what_each_reads_alone(kind: str, family: str, attention: str) -> None:
    from finetune.data.batching import collate
    from finetune.model.attention import register
    from finetune.training.separation import needs_mask, with_mask

    register()
    model, _ = attached(kind, family)
    model.set_attn_implementation(attention)
    rows = rows_of((6, 1, 4, 9))
    masked = needs_mask(model, rows, 0, torch.device("cpu"))
    assert masked == (family == "opt")
    batch = collate(rows, [[0, 1, 2], [3]], 0)
    batch = with_mask(batch, model) if masked else batch
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits
        assert packed.shape[:2] == batch.input_ids_BS.shape
        for b, (start, row) in enumerate([(0, 0), (6, 1), (7, 2), (0, 3)]):
            wanted = model(**collate(rows, [[row]], 0).model_inputs()).logits[0]
            found = packed[b // 3, start : start + len(wanted)]
            assert (found - wanted).abs().max() <= 1e-4


# Gradients


def plain_llama(config: Any, weights: dict[str, Tensor], trained: list[Tensor], kind: str, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of a Llama with virtual positions before the row, written out in float64."""
    embedded = weights["model.embed_tokens.weight"][tokens]
    first = trained[0][0] if kind == "prelayer" else trained[0]
    hidden = torch.cat([first.expand(len(tokens), -1, -1), embedded], 1)
    total, heads, groups = hidden.shape[1], config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(total)[:, None] * torch.cat([inverse, inverse])

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turned(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        if kind == "prelayer":
            hidden = torch.cat([trained[0][i].expand(len(tokens), -1, -1), hidden[:, L:]], 1)
        x = norm(hidden, f"{name}.input_layernorm")
        q, k, v = (
            (x @ weights[f"{name}.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (turned(k), v))
        scores = turned(q) @ k.transpose(-1, -2) / size**0.5
        scores = scores.masked_fill(~torch.ones(total, total, dtype=torch.bool).tril(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up, down = (weights[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        hidden = hidden + (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(hidden, "model.norm")[:, L:] @ weights["lm_head.weight"].T


@each
@pytest.mark.parametrize("quant", ["dense", "nf4"])
def test_gradients_are_those_of_a_plain_float64_model(kind: str, quant: str) -> None:
    model, adapter = attached(kind, "llama", quant)
    nn.functional.cross_entropy(model(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    weights = {name: tensor.double() for name, tensor in dense_twin("llama", quant).state_dict().items()}
    encoder = copy.deepcopy(adapter.encoder).double()
    for parameter in encoder.parameters():
        parameter.grad = None
    wide = plain_llama(model.config, weights, [encoder()], kind, ids())
    nn.functional.cross_entropy(wide[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    for name, parameter in encoder.named_parameters():
        mine = dict(adapter.encoder.named_parameters())[name].grad
        assert (mine - parameter.grad).norm() / parameter.grad.norm() <= 1e-5, name


@each
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_activations_give_the_same_gradients(kind: str, packed: bool) -> None:
    from finetune.data.batching import collate
    from finetune.training.mode import training_mode

    rows = rows_of((6, 2, 9))
    batch = collate(rows, [[0, 1], [2]] if packed else [[0], [2]], 0)
    found = []
    for again in (False, True):
        model, adapter = attached(kind, "llama")
        with training_mode(model, again):
            first, second = (model(**batch.model_inputs()).logits.square().sum() for _ in range(2))
            (first + 2 * second).backward()  # two graphs alive at a time
        found.append([p.grad for p in adapter.trainable().values()])
        assert all(gradient.abs().max() > 0 for gradient in found[-1])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@each
def test_the_chunked_cross_entropy_is_the_models_own(kind: str) -> None:
    from finetune.data.batching import collate
    from finetune.training.objectives.sft import SFTConfig, build

    for family in ("llama", "gpt2", "mixtral"):
        model, adapter = attached(kind, family)
        objective = build(SFTConfig(), model)
        assert objective.head is not None
        batch = collate(rows_of((6, 9)), [[0], [1]], 0)
        loss, count = objective.loss_sum(batch)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.trainable().values())
        with torch.no_grad():
            spoken = model(**batch.model_inputs()).logits
        labels = batch.shifted_labels_BS()
        wanted = nn.functional.cross_entropy(spoken.flatten(0, 1), labels.flatten(), reduction="sum")
        aux = objective.head.aux_coefficient
        assert count == 13
        assert abs(loss.item() - wanted.item()) <= 1e-4 * wanted.item() if not aux else loss > wanted
