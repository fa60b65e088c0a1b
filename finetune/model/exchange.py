"""Modules of a loaded model exchanged for fused ones: norms, gated MLPs, attention.

Candidates are found by structure (structure/exchangeable.py), and each is exchanged only after it was seen to compute,
in the dtype it will run in, what its stand-in computes; otherwise the original stays, with the reason. Nothing of
transformers is patched: stand-ins are modules, and attention goes through transformers' own attention interface. Names
of parameters stay as they are.

Shape suffixes: B rows, S positions, I features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.kernels import native, triton_backend
from finetune.kernels.fused import ACTIVATIONS
from finetune.model.agreement import Exchanged, agree, first_line, noise
from finetune.model.exchange_attention import exchange_attention
from finetune.model.fused_modules import FusedGatedMLP, FusedModule, FusedNorm, Gated, Norm
from finetune.structure.exchangeable import GatedLayers, gated_layers, norm_epsilons, rotary_layers
from finetune.structure.experiments import UNFORESEEN, in_mode

LOUD = 4.0
"""Root mean square of gates in probes: small ones would not tell `act(gate) * up` from `act(up) * gate`."""


def why_not(model: nn.Module) -> str:
    """Why nothing of a model is exchanged; empty where it may be."""
    return _why_not(next(model.parameters()).device.type, _dtype(model))


def _why_not(kind: str, dtype: torch.dtype) -> str:
    if kind in triton_backend.DEVICES:
        return triton_backend.why_off() or ""
    if kind != "cpu":
        return f"there are no fused kernels for {kind}"
    if native.level() not in ("avx512", "avx512_bf16", "amx"):
        return f"the compiled CPU kernels are {native.why_off() or native.level()}; the fused ones want AVX512"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"there are no fused kernels for {dtype}"


@torch.no_grad()
def exchange(model: nn.Module) -> list[Exchanged]:
    """Exchange what can be in a causal language model, in place, and say what became of each candidate.

    Weights, mode and random state are left as they were. Costs a forward pass over a few tokens and a little more.

    Args:
        model: dense or frozen, on the device and in the dtype it will run in; without hooks on what is to be exchanged.
    """
    if why_not(model):
        return []
    dtype = _dtype(model)
    done = exchange_norms(model, dtype)
    with in_mode(model, training=False):
        done += _each(
            model,
            dtype,
            "gated MLP",
            lambda m: gated_layers(m) is not None and any(True for _ in _callables(m)),
            _gated,
        )
        if next(model.parameters()).device.type == "cpu":  # elsewhere torch's attention is a fused one
            done += exchange_attention(model)
    return done


@torch.no_grad()
def exchange_norms(part: nn.Module, dtype: torch.dtype) -> list[Exchanged]:
    """As `exchange`, of a model or a part of one, but the norms alone: projections are called as they were.

    Args:
        dtype: of the activations.
    """
    if _why_not(next(part.parameters()).device.type, dtype):
        return []
    with in_mode(part, training=False):
        return _each(part, dtype, "norm", lambda m: bool(norm_epsilons(m)), _norm)


def candidates(model: nn.Module) -> str:
    """What of a model looks as if it could be fused, counted, whatever device and dtype it is on."""
    looks = {"norm": norm_epsilons, "gated MLP": _looks_gated, "rotary attention": rotary_layers}
    counts = {kind: sum(bool(found(module)) for module in model.modules()) for kind, found in looks.items()}
    return ", ".join(f"{n} x {kind}" for kind, n in counts.items() if n) or "nothing"


def summary(done: list[Exchanged]) -> str:
    """What is fused, counted by kind, in a line; empty where nothing is."""
    fused = Counter(one.kind for one in done if not one.reason)
    return "fused kernels compute " + ", ".join(f"{n} x {kind}" for kind, n in fused.items()) if fused else ""


def notes(done: list[Exchanged]) -> list[str]:
    """A line for each reason why something that looks as if it could be fused is not."""
    left = Counter((one.kind, one.reason) for one in done if one.reason)
    return [f"{n} x {kind} stays as transformers has it: {reason}" for (kind, reason), n in left.items()]


def _each(
    model: nn.Module,
    dtype: torch.dtype,
    kind: str,
    looks_right: Callable[[nn.Module], bool],
    fuse: Callable[[nn.Module, torch.dtype], FusedModule | str],
) -> list[Exchanged]:
    """Try a stand-in for each module that looks right; `fuse` gives it, checked, or a reason."""
    done = []
    for name, module in list(model.named_modules()):
        if not name or isinstance(module, FusedModule) or not looks_right(module):
            continue
        try:
            found = fuse(module, dtype)
        except UNFORESEEN as error:
            found = first_line(error)
        if isinstance(found, FusedModule):
            model.set_submodule(name, found)
        done.append(Exchanged(name, kind, "" if isinstance(found, FusedModule) else found))
    return done


def _norm(module: nn.Module, dtype: torch.dtype) -> FusedModule | str:
    """The stand-in for a norm: epsilon and offset are those that agree, down to features as small as epsilon."""
    weight: Any = module.weight
    epsilons = norm_epsilons(module)
    sizes = torch.tensor([eps**0.5 for eps in epsilons] + [1.0, 30.0]).unsqueeze(1)
    probe_BI = (noise(len(sizes), weight.numel()) * sizes).to(weight.device, dtype)
    wanted = module(probe_BI)
    for eps in epsilons:
        for offset in (0.0, 1.0):
            fused = FusedNorm.of(module, Norm(eps, offset))
            if agree(fused(probe_BI), wanted):
                return fused
    return "it is no RMSNorm"


def _looks_gated(module: nn.Module) -> bool:
    """Whether a module has the projections of a gated MLP and something that may be its activation."""
    return gated_layers(module) is not None and any(True for _ in _callables(module))


def _gated(module: nn.Module, dtype: torch.dtype) -> FusedModule | str:
    """The stand-in for a gated MLP, tried in training mode too: dropout would show."""
    layers = gated_layers(module)
    assert layers is not None
    known = {name for candidate in _callables(module) if (name := _activation(candidate)) is not None}
    if len(known) != 1:
        return "its activation is not one of " + ", ".join(ACTIVATIONS)
    (activation,) = known
    width = getattr(module, layers.pair[0]).in_features
    probe_BSI = noise(2, 3, width).to(next(module.parameters()).device)
    loudness = getattr(module, layers.pair[0])(probe_BSI.to(dtype)).float().square().mean().sqrt()
    probe_BSI = (probe_BSI * (LOUD / loudness)).to(dtype)
    orders = {layers.pair, layers.pair[::-1]}
    fitting = []
    for pair in orders:
        fused = FusedGatedMLP.of(module, Gated(GatedLayers(pair, layers.down), activation))
        with in_mode(module, training=True):
            wanted = module(probe_BSI)
        if agree(module(probe_BSI), wanted) and agree(fused(probe_BSI), wanted):
            fitting.append(fused)
    return fitting[0] if len(fitting) == 1 else "it computes something else than down(act(gate) * up)"


def _callables(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """What a module may use as its activation."""
    for child in module.children():
        if not any(True for _ in child.parameters()):
            yield child
    for value in vars(module).values():
        if callable(value) and not isinstance(value, type | nn.Module):
            yield value


def _activation(candidate: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation that we have, or None."""
    x = torch.linspace(-8, 8, 257)
    try:
        found = candidate(x)
    except Exception:  # any callable of the module is tried
        return None
    same = (
        name
        for name, ours in ACTIVATIONS.items()
        if torch.is_tensor(found) and torch.allclose(ours(x), found, atol=1e-6)
    )
    return next(same, None)


def _dtype(model: Any) -> torch.dtype:
    """The dtype of activations: that of the embeddings."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype
