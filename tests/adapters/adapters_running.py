"""Models at work: with a cache, in beams, padded and packed, each against the plain forward pass of one row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from adapters_models import ids, inputs, task_of
from torch import Tensor, nn

from finetune.adapters.base import Adapter
from finetune.adapters.full_copy import FullCopy
from finetune.data.batching import collate
from finetune.data.rows import Row, TokenRows
from finetune.quant.base import FrozenWeight
from finetune.training.separation import needs_mask, with_mask

CLOSE = 1e-4
LENGTHS = (5, 9)


@contextmanager
def uncoupled(model: nn.Module) -> Iterator[None]:
    """Within it no storage format lets one row take part in what another gives."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FrozenWeight):
                stack.enter_context(module.uncoupled())
        yield


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with activations in a wider dtype, its weights worth what they are worth in their own."""
    wide = copy.deepcopy(model).to(dtype)
    for module in wide.modules():
        if isinstance(module, FullCopy):
            module.dtype = dtype  # it still rounds to what was stored
    return wide


@torch.no_grad()
def sent_alike(first: nn.Module, second: nn.Module, fed: dict[str, Any]) -> Any:
    """Positions [B, S] whose tokens both models of experts send to the same experts; for others, everything."""
    if not any(getattr(first.config, name, 0) for name in ("num_local_experts", "num_experts")):
        return ...
    chosen = []
    for model in (first, second):
        said = model(**fed, output_router_logits=True).router_logits
        best = [layer.topk(model.config.num_experts_per_tok).indices.sort().values for layer in said]
        chosen.append(torch.stack(best, dim=1).view(*fed["input_ids"].shape, -1))
    return (chosen[0] == chosen[1]).all(-1)


def routed_alike(first: nn.Module, second: nn.Module) -> Any:
    """Positions [B, S] up to which both models send every token to the same experts.

    Rounding weights to 16 bits moves routers by as much, and where two experts were as good as equal another one is
    chosen: that is no error of merging, and everything that reads such a token differs by as much as experts do.
    """
    alike = sent_alike(first, second, inputs(first))
    if alike is ...:
        return ...
    same = alike.cumprod(1).bool()
    assert same.float().mean() >= 0.4, "most tokens are sent elsewhere: that is more than rounding"
    return same


def write(model: nn.Module, tokens: int = 8, **settings: Any) -> Any:
    """Generate exactly so many tokens, greedily unless told otherwise, with the raw logits of every step."""
    return model.generate(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True, output_scores=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


@torch.no_grad()
def full(model: nn.Module, prompt: Tensor, sequences: Tensor, tokens: int) -> Tensor:
    """Logits [B, tokens, V] from which the last tokens of some sequences come, by one pass without a cache."""
    if task_of(model) == "Seq2SeqLM":
        given = {"input_ids": prompt, "decoder_input_ids": sequences[:, :-1]}
    else:
        given = {"input_ids": sequences[:, :-1]}
    logits: Tensor = model(**given, use_cache=False).logits[:, -tokens:]
    return logits


def cached_equals_full(model: nn.Module) -> None:
    prompt = ids(rows=1, length=5)
    with uncoupled(model):
        out = write(model, inputs=prompt)
        wanted = full(model, prompt, out.sequences, 8)
    assert torch.allclose(torch.stack(out.logits, dim=1), wanted, atol=CLOSE)


def beams_equal_full(model: nn.Module) -> None:
    """The score of the best beam is the sum of its tokens' log probabilities."""
    prompt = ids(rows=2, length=5)
    with uncoupled(model):
        out = write(model, 5, inputs=prompt, num_beams=3, length_penalty=0.0)
        wanted = full(model, prompt, out.sequences, 5).log_softmax(-1)
    chosen = wanted.gather(-1, out.sequences[:, -5:, None]).sum(dim=(1, 2))
    assert torch.allclose(out.sequences_scores, chosen, atol=CLOSE)


def padded_equals_single(model: nn.Module) -> None:
    """Rows of two lengths in a batch: padded on the left where the model goes on after them, on the right elsewhere."""
    task, longest = task_of(model), max(LENGTHS)
    rows = [ids(rows=1, length=length) for length in LENGTHS]
    batch, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(-row.shape[1], None) if task == "CausalLM" else slice(row.shape[1])
        batch[i, place], mask[i, place] = row[0], 1
    with uncoupled(model), torch.no_grad():
        if task in ("SequenceClassification", "MaskedLM"):
            found = model(batch, attention_mask=mask).logits
            found = found if task == "SequenceClassification" else found[mask.bool()]
            wanted = torch.cat([model(row).logits.flatten(0, -2) for row in rows])
        else:
            found = torch.stack(write(model, 6, inputs=batch, attention_mask=mask).logits, dim=1)
            wanted = torch.cat([torch.stack(write(model, 6, inputs=row).logits, dim=1) for row in rows])
    assert torch.allclose(found, wanted, atol=CLOSE), (found - wanted).abs().max()


def packed_equals_single(model: nn.Module, adapter: Adapter) -> None:
    """Logits of each row, and gradients of the sum of their losses."""
    rows = TokenRows.of([Row(r.numpy()[0], r.numpy()[0]) for r in (ids(1, 5), ids(1, 7).flip(1), ids(1, 4) + 1)])
    with uncoupled(model):
        masked = needs_mask(model, rows, 0, torch.device("cpu"))
        model.train()
        found, packed = _learn(model, adapter, rows, [[0, 1], [2]], masked)
        wanted, single = [], {name: torch.zeros_like(g) for name, g in packed.items()}
        for i in range(len(rows)):
            logits, gradients = _learn(model, adapter, rows, [[i]], masked)
            wanted += logits
            single = {name: single[name] + g for name, g in gradients.items()}
    for mine, alone in zip(found, wanted, strict=True):
        assert torch.allclose(mine, alone, atol=CLOSE), (mine - alone).abs().max()
    total = sum(g.norm() ** 2 for g in single.values()).sqrt()
    for name, gradient in packed.items():
        assert (gradient - single[name]).norm() <= 1e-4 * single[name].norm() + 1e-6 * total, name


def _learn(
    model: nn.Module, adapter: Adapter, rows: TokenRows, sequences: list[list[int]], masked: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The logits of each row, and the gradients of the sum over all tokens."""
    batch = collate(rows, sequences, 0)
    batch = with_mask(batch, model) if masked else batch
    model.zero_grad()
    logits_BSV = model(**batch.model_inputs()).logits
    F.cross_entropy(logits_BSV.flatten(0, 1), batch.shifted_labels_BS().flatten(), reduction="sum").backward()
    pieces = []
    for b, sequence in enumerate(sequences):
        sizes = [len(rows[i].input_ids) for i in sequence]
        pieces += [piece.detach() for piece in logits_BSV[b, : sum(sizes)].split(sizes)]
    return pieces, {name: p.grad.clone() for name, p in adapter.trainable().items()}
