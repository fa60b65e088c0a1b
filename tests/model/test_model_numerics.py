"""One numerics: however a sequence is cut up, the embedded base in 4 bits says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finetune as ft

TEXT = "Question: What does os.path.join do?\nAnswer: It joins the parts of a path with the separator of the system"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any, str]:
    torch.set_num_threads(1)
    model, tokenizer = ft.load("embedded", quant=ft.NF4Config(), dtype=request.param, device="cpu")
    return model.eval(), tokenizer, request.param


def cut(model: Any, ids_BS: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a sequence fed through the cache a piece at a time."""
    past, parts = None, []
    for piece in ids_BS.split(sizes, dim=1):
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def close(found: Tensor, wanted: Tensor, dtype: str) -> None:
    """Logits within 1e-4; in bf16, whose last place is already more than that, within 2e-2 of the largest."""
    most = 1e-4 if dtype == "fp32" else 2e-2 * wanted.abs().max().item()
    assert (found.float() - wanted.float()).abs().max().item() <= most
    if dtype == "fp32":
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@torch.no_grad()
def test_pieces_batches_and_caches_agree(loaded: tuple[Any, Any, str]) -> None:
    model, tokenizer, dtype = loaded
    ids_BS = torch.tensor([tokenizer(TEXT).input_ids])
    length = ids_BS.shape[1]
    whole = model(ids_BS, use_cache=False).logits
    close(cut(model, ids_BS, [1] * length), whole, dtype)
    close(cut(model, ids_BS, [5, 4, length - 9]), whole, dtype)
    close(model(ids_BS.repeat(9, 1), use_cache=False).logits[:1], whole, dtype)
    cached, plain = (
        model.generate(ids_BS, max_new_tokens=24, do_sample=False, use_cache=cached)[0] for cached in (True, False)
    )
    apart = (cached != plain).nonzero()
    if len(apart):  # two tokens may tie in bf16, whose logits near 10 are 1/16 apart; then rounding chooses
        best = model(plain[None, : int(apart[0])], use_cache=False).logits[0, -1].topk(2).values
        assert dtype == "bf16" and best[0] - best[1] <= 1 / 16


def test_the_grad_mode_changes_no_bit(loaded: tuple[Any, Any, str]) -> None:
    model, tokenizer, _ = loaded
    embedded = model.get_input_embeddings()(torch.tensor([tokenizer(TEXT).input_ids])).detach()
    recorded = model(inputs_embeds=embedded.clone().requires_grad_(), use_cache=False).logits
    with torch.inference_mode():
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, recorded)


def test_an_evaluation_changes_no_gradient(loaded: tuple[Any, Any, str]) -> None:
    model, tokenizer, _ = loaded
    ids_BS = torch.tensor([tokenizer(TEXT).input_ids])
    embedded = model.get_input_embeddings()(ids_BS).detach().requires_grad_()

    def gradient() -> Tensor:
        model.train()
        loss = model(inputs_embeds=embedded, labels=ids_BS, use_cache=False).loss
        (found,) = torch.autograd.grad(loss, embedded)
        return found

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(ids_BS)
    assert torch.equal(gradient(), before)
