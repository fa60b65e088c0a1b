"""What the inputs of each frozen linear look like on training rows, gathered a few layers at a time.

Shape suffixes: B rows, S positions, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.data.batching import eval_batches
from finetune.data.rows import TokenRows
from finetune.export.merge import frozen_at

TOKENS = 32_768
"""Calibration tokens, at most: GPTQ's curves flatten out well before its 128 x 2,048 where the domain is narrow."""
BUDGET_BYTES = 2**31
"""Memory for the gathered products at one time; a larger model is run through once for each share of its layers."""
BATCH_ROWS = 8


class Calibration:
    """Sums x x^T over the inputs of frozen linears, on demand.

    Args:
        model: adapted, unmerged, as it was trained.
        names: of the linears in the order in which they will be asked for.
        rows: training rows; the first `TOKENS` tokens of them are used.
        pad_id: token that fills up short rows; padding is left out of the sums.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rows: TokenRows, pad_id: int) -> None:
        self.model, self.names, self.pad_id = model, list(names), pad_id
        self.rows = rows[: max(1, int((rows.offsets[1:] <= TOKENS).sum()))]
        self._grams: dict[str, Tensor] = {}

    def gram(self, name: str) -> Tensor | None:
        """sum of x x^T, float32 [I, I]; None for a linear that saw no input."""
        if name not in self._grams and name in self.names:
            self._gather(self._share(name))
        return self._grams.get(name)

    def _share(self, first: str) -> list[str]:
        """As many linears from `first` on as the budget holds, at least one."""
        share: list[str] = []
        size = 0
        for name in self.names[self.names.index(first) :]:
            linear = frozen_at(self.model, name)
            size += 4 * linear.in_features**2 if linear is not None else 0
            if share and size > BUDGET_BYTES:
                break
            share.append(name)
        return share

    @torch.no_grad()
    def _gather(self, names: list[str]) -> None:
        self._grams = {}
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            with self._watching(names) as mask:
                for batch in eval_batches(self.rows, BATCH_ROWS, self.pad_id):
                    on_device = batch.to(device)
                    assert on_device.attention_mask_BS is not None
                    mask["BS"] = on_device.attention_mask_BS.bool()
                    self.model(**on_device.model_inputs())
        finally:
            self.model.train(was_training)

    @contextmanager
    def _watching(self, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Add up the inputs of the named linears while the model runs; the caller keeps `mask["BS"]` current."""
        mask: dict[str, Tensor] = {}

        def watch(name: str):
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x_BSI = inputs[0]
                if x_BSI.shape[:2] == mask["BS"].shape:
                    x = x_BSI[mask["BS"]].float()
                else:
                    x = x_BSI.reshape(-1, x_BSI.shape[-1]).float()
                product = x.T @ x
                self._grams[name] = product if name not in self._grams else self._grams[name].add_(product)

            return hook

        handles = []
        for name in names:
            # An adapter may multiply by the frozen weight without calling it: what stands at its name is called.
            if frozen_at(self.model, name) is not None:
                handles.append(self.model.get_submodule(name).register_forward_pre_hook(watch(name)))
        try:
            yield mask
        finally:
            for handle in handles:
                handle.remove()
