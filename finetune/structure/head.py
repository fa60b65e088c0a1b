"""How a causal language model turns its last hidden states into logits and a loss, found by experiment.

Models differ in what they do after the head: nothing (Llama), a scale (Cohere, Granite), a tanh cap (Gemma 2), a
load-balancing term beside the cross entropy (Mixtral). No table of families here: the decoder's output is replaced by
hidden states of our choosing, over five decades of magnitude, and what the model makes of them is compared with what it
would make of them under each hypothesis. Only a description that the model itself confirms is returned.

Shape suffixes: B rows, S positions, H hidden features, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.structure.experiments import UNFORESEEN, in_mode

MAGNITUDES = (1e-2, 1.0, 1e2)
"""Root mean square of the logits that the probes aim at: a cap is invisible in small ones, a bias in large ones."""


@dataclass(frozen=True)
class Head:
    """What lies between hidden states and loss: `logits = cap(scale * module(hidden))`.

    Attributes:
        decoder: the module whose first output is the hidden states [B, S, H].
        module: the output head; its own bias is part of it.
        scale: factor on the head's output.
        softcap: c of `c tanh(z / c)` after the scale; None for none.
        aux_coefficient: weight of the model's auxiliary loss in its own loss; 0.0 where it has none.
    """

    decoder: nn.Module
    module: nn.Module
    scale: float
    softcap: float | None
    aux_coefficient: float


def describe_head(model: nn.Module) -> Head | None:
    """The head of a transformers causal language model, or None where it is not understood.

    Leaves weights, mode and random state as they were. Costs a few forward passes over eight tokens.
    """
    head, decoder = _parts(model)
    if head is None or decoder is None:
        return None
    device = next(model.parameters()).device
    try:
        with (
            in_mode(model, training=False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            return _identify(model, decoder, head, device)
    except UNFORESEEN:  # its own forward still works
        return None


def _parts(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Head and decoder by the two accessors that every transformers model has."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return head, decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _identify(model: nn.Module, decoder: nn.Module, head: nn.Module, device: torch.device) -> Head | None:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocab = embeddings.weight.shape[0]
    ids_BS = torch.randint(0, vocab, (2, 4), device=device)
    hidden_BSH = _hidden(model, decoder, ids_BS)
    if hidden_BSH is None or hidden_BSH.dim() != 3:
        return None
    pairs = list(_probe(model, decoder, head, ids_BS, hidden_BSH))
    if any(z.shape != logits.shape for z, logits in pairs):
        return None
    tolerance = 16 * torch.finfo(hidden_BSH.dtype).eps
    fitting = [
        (scale, cap)
        for scale, cap in _hypotheses(model.config, pairs)
        if all(_close(_apply(z, scale, cap), logits, tolerance) for z, logits in pairs)
    ]
    if not fitting:
        return None
    scale, cap = fitting[0]
    coefficient = _aux_coefficient(model, decoder, head, ids_BS, scale, cap, tolerance)
    return None if coefficient is None else Head(decoder, head, scale, cap, coefficient)


@contextmanager
def captured(decoder: nn.Module, replacement: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Collect the decoder's first output while it runs inside its model, optionally putting another in its place."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        seen.append(output[0])
        if replacement is None:
            return None
        if isinstance(output, tuple):
            return (replacement, *output[1:])
        output = type(output)(**output)
        output.last_hidden_state = replacement
        return output

    handle = decoder.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _hidden(model: nn.Module, decoder: nn.Module, ids_BS: Tensor) -> Tensor | None:
    with captured(decoder) as seen:
        model(input_ids=ids_BS, use_cache=False)
    return seen[0] if len(seen) == 1 and isinstance(seen[0], Tensor) else None


def _probe(
    model: nn.Module, decoder: nn.Module, head: nn.Module, ids_BS: Tensor, like_BSH: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For hidden states of several magnitudes: what the head alone says, and what the model says."""
    noise_BSH = torch.randn_like(like_BSH)
    unit = head(noise_BSH).float().pow(2).mean().sqrt().item() or 1.0
    for magnitude in MAGNITUDES:
        # float16 would overflow where the head's rows are small
        factor = min(magnitude / unit, 0.1 * torch.finfo(like_BSH.dtype).max)
        probe_BSH = noise_BSH * factor
        with captured(decoder, probe_BSH):
            logits = model(input_ids=ids_BS, use_cache=False).logits
        yield head(probe_BSH).float(), logits.float()


def _hypotheses(config: Any, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[float, float | None]]:
    """Candidate (scale, cap), simplest first: numbers that the config keeps about logits, and the measured ratio."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = [
        float(value)
        for key, value in text.to_dict().items()
        if "logit" in key and isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
    z, logits = pairs[0]
    measured = ((z * logits).sum() / z.pow(2).sum()).item()
    named = [scale for number in numbers for scale in (number, 1 / number)]
    exact = [scale for scale in (1.0, *named) if math.isclose(scale, measured, rel_tol=1e-2)]
    scales = sorted(exact, key=lambda scale: abs(scale - measured)) or [measured]
    for cap in (None, *numbers):
        for scale in scales:
            yield scale, cap


def _apply(z: Tensor, scale: float, cap: float | None) -> Tensor:
    return z * scale if cap is None else torch.tanh(z * scale / cap) * cap


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _aux_coefficient(
    model: nn.Module,
    decoder: nn.Module,
    head: nn.Module,
    ids_BS: Tensor,
    scale: float,
    cap: float | None,
    tolerance: float,
) -> float | None:
    """The factor of `aux_loss` in the model's own loss; None where the loss is not cross entropy plus that."""
    with captured(decoder) as seen:
        outputs = model(input_ids=ids_BS, labels=ids_BS, use_cache=False)
    logits_BSV = _apply(head(seen[0]).float(), scale, cap)
    ours = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()).item()
    theirs = outputs.loss.item()
    tolerance *= max(1.0, abs(theirs))
    config: Any = model.config
    aux = getattr(outputs, "aux_loss", None)
    if aux is None:
        return 0.0 if abs(ours - theirs) <= tolerance else None
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None  # its auxiliary loss would come with full logits
    numbers = (value for key, value in config.to_dict().items() if "aux_loss" in key and isinstance(value, float))
    return next((c for c in (0.0, *numbers) if abs(ours + c * aux.item() - theirs) <= tolerance), None)
