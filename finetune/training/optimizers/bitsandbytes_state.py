"""What the bitsandbytes optimizers can do on a device, found by trying, in one place."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from finetune.training.optimizers.parameter_groups import Parameters

PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a state tensor (`Optimizer2State.get_state_buffer`); smaller ones stay
resident."""


def works_here(optimizer_type: str, device: torch.device) -> str | None:
    """None where `bitsandbytes.optim.<optimizer_type>` takes a correct step on the device, else the reason why not."""
    try:
        import bitsandbytes

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            warnings.simplefilter("ignore")
            probe = torch.nn.Parameter(torch.zeros(PAGED_FROM, device=device))
            probe.grad = torch.ones_like(probe)
            optimizer = getattr(bitsandbytes.optim, optimizer_type)([probe], lr=0.5)
            optimizer.step()
            moved = probe.detach().cpu()
            paged = all(getattr(optimizer.state[probe][key], "is_paged", False) for key in ("state1", "state2"))
    except Exception as error:  # whatever it is, the answer is that it does not work here
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if getattr(optimizer, "is_paged", False) and not paged:
        return f"{device.type} has no paged memory"
    # the first step of Adam moves every weight by the learning rate, whatever the gradient
    return None if torch.allclose(moved, torch.tensor(-0.5), atol=1e-2) else "its step is wrong"


def build_or_adamw(
    optimizer_type: str, name: str, parameters: Parameters, settings: dict[str, Any], device: torch.device
) -> tuple[torch.optim.Optimizer, str | None]:
    """The bitsandbytes optimizer, or torch's AdamW with a line that says why."""
    reason = works_here(optimizer_type, device)
    if reason is not None:
        note = (
            f"optim={name} does not work on {device.type} ({reason}): torch's AdamW with 32-bit state takes its place"
        )
        return torch.optim.AdamW(parameters, **settings), note
    import bitsandbytes

    return getattr(bitsandbytes.optim, optimizer_type)(parameters, **settings), None


def to_pages(optimizer: torch.optim.Optimizer) -> None:
    """Move state that was just restored back into paged buffers, where the optimizer keeps its state in them."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            plain = state.get(key)
            if plain is None or plain.numel() < PAGED_FROM:
                continue
            paged = optimizer.get_state_buffer(parameter, dtype=plain.dtype)  # type: ignore[attr-defined]
            paged.copy_(plain)
            state[key] = paged
