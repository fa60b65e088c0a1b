"""Quantize a model block by block, each one calibrated on what the quantized blocks before it put out.

The order is GPTQ's (Frantar et al. 2022, arXiv:2210.17323, section 4): a block is replaced before the inputs of the
next one are made, and within a block what reads the same tensor is quantized together, before what reads the result
("true-sequential"). Without rows nothing is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from finetune.quant.base import QUANTIZERS, FrozenLinear
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.freeze import empty_frozen, freeze, head_of, replace_projection
from finetune.quant.gram import Gram
from finetune.quant.layer import Layer
from finetune.quant.packed import PackedWeight
from finetune.quant.pruners.apply import prune
from finetune.quant.pruners.cut import Cut
from finetune.quant.recipe import Recipe
from finetune.quant.replay import Batch, Calls, Enough, Sink, inputs_of, reading_alike, watching
from finetune.quant.resident import Resident, lay_out
from finetune.quant.rounders.base import apply
from finetune.quant.rounders.rtn import RTN
from finetune.quant.settled import Forward, Settled
from finetune.quant.token_clip import clip_tokens
from finetune.structure.base import Projection, Structure

Progress = Callable[[Layer, int, int], None]
"""`progress(layer, done, of)`, after each projection."""
CALIBRATION, TARGETS = "calibration", "targets"
"""Names of hidden states that are kept: what goes into a block, and what the one before it was trained to put out."""
Prepare = Callable[[PackedWeight], None]
"""Told each empty module before it is filled."""


class Driver:
    """One model on its way into a storage format.

    Args:
        model: of transformers, dense; changed in place. In memory as far as `resident` says.
        structure: what `finetune.structure.inspect(model)` found.
        recipe: what is done to each block.
        batches: calibration data; no row padded. Empty rounds to nearest whatever the inputs.
        resident: brings the blocks into memory, and knows what an earlier run has finished; by default the whole model
            is in memory.
        progress, prepare: see there.

    Raises:
        ConfigError: where the head is to be quantized but shares its weight with the embeddings; where the storage
            format cannot hold a layer of such a size.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        recipe: Recipe,
        batches: Sequence[Batch] = (),
        resident: Resident | None = None,
        progress: Progress = lambda layer, done, of: None,
        prepare: Prepare = lambda module: None,
    ) -> None:
        self.model, self.structure, self.recipe, self.batches = model, structure, recipe, batches
        self.resident, self.progress, self.prepare = resident or Resident(), progress, prepare
        quant, rounder, cut = recipe.quant, recipe.rounder, recipe.cut
        self.todo = self._todo(structure if cut is None else cut.structure)
        self.heads = list(head_of(model, quant, structure))
        for p in (*self.todo, *self.heads):
            rounder.check_layer(p.name, p.out_features * p.experts, p.in_features)
            QUANTIZERS.build(quant, p.out_features, p.in_features, device="meta")  # refuses sizes that it cannot hold
        self.layers: list[Layer] = list(self.resident.layers)

    @torch.no_grad()
    def go(self) -> list[Layer]:
        """Quantize every projection of the blocks, and the head where the format says so.

        Raises:
            ModelError: when a weight is not finite.
        """
        self.resident.begin(self.model, self.structure)
        if self.recipe.cut is not None:
            self._begin_cut(self.recipe.cut)
        before = {layer.name: layer.sparsity or 0.0 for layer in self.layers}
        for p in self.todo:
            if p.name in before:
                lay_out(self.model, self.recipe.quant, p, self.prepare, before[p.name])
        was_training = self.model.training
        self.model.eval()
        for stack in self.structure.stacks:
            self._stack(stack.blocks)
        done = {layer.name for layer in self.layers}
        for p in self.todo:
            if p.name not in done:
                self._quantize(p, [None] * p.experts if self.batches else [])
        for p in self.heads:
            replace_projection(self.model, DenseConfig(), p)
            self._quantize(p, [self._read_by_head(p)] if self.batches else [])
        freeze(self.model, self.recipe.quant, replace(self.structure, projections=()))
        self.model.train(was_training)
        order = [p.name for p in (*self.todo, *self.heads)]
        return sorted(self.layers, key=lambda layer: order.index(layer.name))

    def _read_by_head(self, p: Projection) -> Gram:
        """What the head reads in the quantized model, over all batches."""
        gram = Gram()

        def saw(_name: str, _expert: int, x: Tensor) -> None:
            gram.add(x)
            raise Enough

        with watching(self.model, [p], saw):
            self.resident.predict(self.model, self.batches)
        return gram

    def _todo(self, structure: Structure) -> list[Projection]:
        """The projections that are to be stored anew."""
        as_it_is = isinstance(self.recipe.quant, DenseConfig) and self.recipe.pruner is None
        return [p for p in structure.projections if not p.dense and not as_it_is]

    def _begin_cut(self, cut: Cut) -> None:
        """Have it decided what goes, and what an earlier run has finished be of the size that it left."""
        cut.begin(self)
        self.structure = cut.structure
        self.todo = self._todo(cut.structure)
        for name in self.structure.stacks[0].blocks[: self.resident.finished]:
            cut.lay_out(self.model, name)

    def _stack(self, blocks: Sequence[str]) -> None:
        """All blocks of a stack, in order."""
        calls = self.resident.calls(self.model, blocks, self.batches) if self.batches else Calls()
        targets = calls.hidden
        if self.recipe.distiller is not None and self.resident.finished:
            targets = self.resident.kept(TARGETS, self.resident.finished)
        for number, name in enumerate(blocks):
            if number < self.resident.finished:
                continue
            self.resident.enter(number, name)
            projections = [p for p in self.todo if p.name.startswith(f"{name}.")]
            if self.batches:
                if number and not calls.chained[number]:
                    calls.hidden = inputs_of(self.model, name, self.batches)
                forward = calls.forward(number, self.model.get_submodule(name))
                if self.recipe.distiller is not None:
                    targets = self._targets(number, name, calls, targets)
                if self.recipe.cut is not None:
                    self.recipe.cut.block(self, name, partial(calls.run, number))
                    forward = calls.forward(number, self.model.get_submodule(name))
                settled = self._settled(number, name, projections, forward)
                if projections:
                    self._block(projections, settled)
                if self.recipe.distiller is not None and projections:
                    settled.undo()
                    self.recipe.distiller.block(self.model, name, forward, targets)
                calls.hidden = self.resident.keep(CALIBRATION, number + 1, settled.run())
                settled.undo()
                calls.arguments[number] = []  # nothing needs them any more
            else:
                for p in projections:
                    self._quantize(p, [])
            self.resident.leave(number, name, self.layers[len(self.layers) - len(projections) :])

    def _targets(self, number: int, block: str, calls: Calls, before: Sink) -> Sink:
        """What a block, dense as yet, is to be trained to put out.

        Args:
            before: what the dense blocks before it put out.
        """
        assert self.recipe.distiller is not None
        same = self.recipe.distiller.config.targets == "same" or (number > 0 and not calls.chained[number])
        there = replace(calls, hidden=calls.hidden if same else before)
        return self.resident.keep(TARGETS, number + 1, there.run(number, self.model.get_submodule(block)))

    def _settled(self, number: int, name: str, projections: Sequence[Projection], forward: Forward) -> Settled:
        """What knows the finished parts of a block."""

        def keep(part: str, hidden: Iterator[Tensor]) -> Sink:
            return self.resident.keep(part, number, hidden)

        return Settled(
            self.model.get_submodule(name), name, [p.name for p in projections], forward, len(self.batches), keep
        )

    def _block(self, projections: list[Projection], settled: Settled) -> None:
        """The projections of one block, group after group of those that read the same."""
        if self.recipe.transform is not None and projections:
            self.recipe.transform.block(self, projections, settled.run)
        by_name = {p.name: p for p in projections}
        groups = reading_alike(self.model, projections, settled.rehearse)
        grouped = {name for names, _ in groups for name in names}
        # Not used in the first batch, as experts may be: what each of them reads is its own.
        rest = [p for p in projections if p.name not in grouped]
        for names, once in groups:
            group = [by_name[name] for name in names]
            stacked = group[0].kind == "experts"
            self._group(group, group if stacked else group[:1], settled, once and not stacked, not rest)
        if rest:
            self._group(rest, rest, settled, False, False)

    def _group(
        self, group: list[Projection], watched: list[Projection], settled: Settled, once: bool, ordered: bool
    ) -> None:
        """Gather the inputs of a group over all batches, and quantize it.

        Args:
            watched: all of it, or one whose inputs are those of all.
            once: one is watched, and each run of the block uses it once: what comes after it need not be run.
            ordered: whatever is not quantized yet comes after it.
        """
        seen: dict[tuple[str, int], Gram] = {}

        def saw(name: str, expert: int, x: Tensor) -> None:
            seen.setdefault((name, expert), Gram()).add(x)
            if once:
                raise Enough

        with watching(self.model, watched, saw):
            settled.gather(group[0].name if once and ordered and len(group) == 1 else None)
        for reader in watched if self.recipe.quant.clipped_bits else ():
            gram = seen.get((reader.name, 0))
            if gram is not None and reader.kind != "experts":
                readers = group if len(watched) == 1 else [reader]
                clip_tokens(self.model, reader, readers, gram, self.recipe.quant.clipped_bits, settled.run)
        for number, p in enumerate(group):
            reader = watched[number if len(watched) == len(group) else 0]
            self._quantize(p, [seen.get((reader.name, expert)) for expert in range(p.experts)])
        settled.done(p.name for p in group)

    def _quantize(self, p: Projection, grams: Sequence[Gram | None]) -> None:
        """Put a frozen module in the place of a dense one."""
        begun = time.perf_counter()
        dense = self.model.get_submodule(p.name)
        assert isinstance(dense, DenseLinear | DenseExperts)
        weight = dense.weight
        frozen = empty_frozen(self.recipe.quant, p, dense, dtype=weight.dtype, device=weight.device)
        if isinstance(frozen, PackedWeight):
            self.prepare(frozen)
            if isinstance(frozen, FrozenLinear):
                frozen.see_inputs(grams[0].limit if grams and grams[0] is not None else None)
        matrices = [None if gram is None else gram.matrix_II for gram in grams]
        rounder, w, sparsity = self.recipe.rounder if grams else RTN(), dense.dequantize(weight.dtype), None
        if self.recipe.pruner is not None and p not in self.heads:
            outcome = prune(self.recipe.pruner, rounder, frozen, w, matrices)
            result, sparsity = outcome.rounded, outcome.sparsity
        else:
            assert isinstance(frozen, PackedWeight)
            if self.recipe.transform is not None and grams:
                rounder = self.recipe.transform.rounder(rounder, self.recipe.quant, matrices)
            result = apply(rounder, frozen, w, matrices)
        if self.recipe.distiller is not None and result.grid is not None and p.block is not None:
            assert isinstance(frozen, PackedWeight)
            self.recipe.distiller.take(p.name, frozen, result.grid, frozen.codes_layout(w))
        parent, _, leaf = p.name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, frozen)
        layer = Layer(
            p.name,
            result.error_rtn,
            result.error,
            result.damping,
            frozen.bits_per_weight(),
            sum(gram.samples for gram in grams if gram is not None),
            sum(matrix is None for matrix in matrices),
            time.perf_counter() - begun,
            result.note,
            sparsity,
        )
        self.layers.append(layer)
        self.progress(layer, len(self.layers), len(self.todo) + len(self.heads))
