"""Find what a transformers model is made of, by type, attribute and shape; never by the family's name.

Works on dense models and on frozen ones, with real weights or on the meta device. Shape suffixes: O out features,
I in features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from finetune.structure.base import Projection, Structure
from finetune.structure.stacks import block_owners, find_stacks, task_head
from finetune.structure.ties import accessor, tied_modules


def inspect(model: nn.Module) -> Structure:
    """Describe a model: its repeated blocks, the projections in them, its head and its embeddings.

    The blocks are the entries of the outermost `nn.ModuleList` that holds most projection weights. Routers and scoring
    gates of mixtures of experts are no projections: they are tiny, and an error in them sends a token elsewhere.

    Args:
        model: of transformers (decoder, encoder or both), dense or with frozen modules in place of its projections.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = names.get(id(accessor(model, "get_output_embeddings")))
    lists = [_blocks(model.get_submodule(owner), owner) for owner in block_owners(model)]
    blocks = [block for group in lists for block in group]
    stacks = find_stacks(model, lists)
    embeddings = next((stack.embeddings for stack in stacks if stack.embeddings is not None), None)
    embeddings = embeddings or names.get(id(accessor(model, "get_input_embeddings")))
    ties = tied_modules(model, embeddings, head)
    return Structure(
        blocks=tuple(blocks),
        projections=tuple(_block_projections(model, blocks)),
        head=head,
        embeddings=embeddings,
        tied=head in ties,
        ties=ties,
        stacks=stacks,
        task_head=task_head(model, stacks, head),
    )


def projection_of(module: nn.Module, name: str) -> Projection | None:
    """The projection that a module is, or None where it is something else.

    A `Linear` (or a subclass with no state but weight and bias), a frozen linear (in_features, out_features,
    dequantize), or transformers' `Conv1D`, known by `nf` and a weight [I, nf]. A frozen linear that stands for a Conv1D
    says so by a true attribute `transposed`.
    """
    if isinstance(module, nn.Linear):
        plain = {n for n, _ in module.named_parameters()} <= {"weight", "bias"} and module.weight.dim() == 2
        return Projection(name, "linear", module.in_features, module.out_features) if plain else None
    if _is_frozen(module) and not hasattr(module, "num_experts"):
        transposed = bool(getattr(module, "transposed", False))
        kind = "conv1d" if transposed else "linear"
        return Projection(name, kind, module.in_features, module.out_features, transposed=transposed)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]:
        return Projection(name, "conv1d", weight.shape[0], weight.shape[1], transposed=True)
    return None


def routers(model: nn.Module, block: str) -> tuple[str, ...]:
    """Names of the modules of a block that only choose or weigh experts, linear layers or not, in module order."""
    module = model.get_submodule(block)
    found = _routers(module, block)
    for name, parent, counts in _beside_experts(module, block):
        for child, sub in parent.named_children():
            matrices = [p for p in sub.parameters(recurse=False) if p.dim() == 2]
            if not counts[child] and any(p.shape[0] in counts.values() for p in matrices):
                found.add(f"{name}.{child}")
    return tuple(name for name, _ in module.named_modules(prefix=block) if name in found)


def _block_projections(model: nn.Module, blocks: Sequence[str]) -> Iterator[Projection]:
    """The projections of all blocks, each with the number of its block."""
    wanted_dense = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    wanted_dense |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for index, block in enumerate(blocks):
        module = model.get_submodule(block)
        left = _routers(module, block)
        for p in _projections(module, block):
            if p.name not in left:
                yield replace(p, block=index, dense=not wanted_dense.isdisjoint(p.name.split(".")))


def speaks_experts_interface(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface: its eager loop reads weights as `weight[expert]`.

    `transformers.integrations.moe.use_experts_implementation` gives such a module `is_transposed` (memory is [E, I,
    O]). Weights of experts modules outside that interface are read in ways we cannot know, so they stay as they are.
    """
    return isinstance(getattr(module, "num_experts", None), int) and hasattr(module, "is_transposed")


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module holds a frozen weight, or wraps one, by the contract of quant/base.py."""
    return all(hasattr(module, key) for key in ("in_features", "out_features", "dequantize"))


def _experts(module: nn.Module, prefix: str) -> Iterator[Projection]:
    """The 3-D projections of a module that follows the experts interface, dense parameters or frozen children."""
    experts, transposed = int(module.num_experts), bool(module.is_transposed)  # type: ignore[arg-type]
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.shape[0] == experts:
            out_features, in_features = parameter.shape[:0:-1] if transposed else parameter.shape[1:]
            found[name] = (in_features, out_features)
    for name, child in module.named_children():
        if _is_frozen(child) and hasattr(child, "num_experts"):
            found[name] = (child.in_features, child.out_features)  # type: ignore[assignment]
    for name, (in_features, out_features) in found.items():
        yield Projection(f"{prefix}.{name}", "experts", in_features, out_features, experts, transposed)


def _projections(module: nn.Module, prefix: str) -> Iterator[Projection]:
    """Every projection at or below a module, in module order; a wrapped projection counts once, by its wrapper."""
    found = projection_of(module, prefix)
    if found is not None:
        yield found
        return
    if speaks_experts_interface(module):
        yield from _experts(module, prefix)
    for name, child in module.named_children():
        if not _is_frozen(child) or not hasattr(child, "num_experts"):
            yield from _projections(child, f"{prefix}.{name}" if prefix else name)


def _blocks(owner: nn.Module, prefix: str) -> list[str]:
    """Names of the entries of the outermost ModuleList with most projection weights below a module of that name."""
    best: list[str] = []
    best_weights = 0
    inside: tuple[str, ...] = ()
    for name, module in owner.named_modules(prefix=prefix):
        if not isinstance(module, nn.ModuleList) or name.startswith(inside):
            continue
        inside += (f"{name}.",)
        weights = sum(p.in_features * p.out_features * p.experts for p in _projections(module, name))
        if weights > best_weights:
            best, best_weights = [f"{name}.{entry}" for entry, _ in module.named_children()], weights
    return best


def _expert_count(module: nn.Module) -> int:
    """How many experts a module holds, by its own count or as a list of like-typed children; 0 where it holds none."""
    if isinstance(module, nn.ModuleList):
        alike = len({type(child) for child in module}) == 1 and len(module) > 1
        return len(module) if alike and any(True for _ in _projections(module[0], "")) else 0
    stacked = any(p.dim() == 3 for p in module.parameters(recurse=False)) or any(map(_is_frozen, module.children()))
    count = getattr(module, "num_experts", None)
    return count if stacked and isinstance(count, int) and not _is_frozen(module) else 0


def _beside_experts(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, dict[str, int]]]:
    """The modules that hold experts among their children, by name, with how many experts each child holds."""
    for name, module in block.named_modules(prefix=prefix):
        counts = {child: _expert_count(sub) for child, sub in module.named_children()}
        if any(counts.values()):
            yield name, module, counts


def _routers(block: nn.Module, prefix: str) -> set[str]:
    """Names of the projections beside experts that choose or weigh them: as many outputs as experts, or one.

    Such a projection is the only one of its branch, which tells it from a shared expert of a like width.
    """
    routers: set[str] = set()
    for name, module, counts in _beside_experts(block, prefix):
        widths = {count for count in counts.values() if count}
        for child, sub in module.named_children():
            branch = list(_projections(sub, f"{name}.{child}")) if not counts[child] else []
            if len(branch) == 1 and branch[0].out_features in widths | {1}:
                routers.add(branch[0].name)
    return routers
