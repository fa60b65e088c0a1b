"""PreLayer: virtual positions before every row whose hidden states are trained anew at every layer.

Hu et al. 2021 (arXiv:2106.09685) section 5.1, "prefix-layer tuning": what a layer computes at these positions is
replaced by trained vectors before the next one reads it, N L H parameters for N layers. Keys and values still come out
of the layer's own norm, projections and rotation; in that it differs from prefix tuning, which trains them.

Where it starts from tokens, a position starts at each layer as the hidden state that the model itself has there when it
reads these tokens.

Shape suffixes: B rows, N layers, L virtual positions, T all positions, H features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from finetune.adapters.base import ADAPTERS
from finetune.adapters.input import Materialised, PromptEncoder, Removable
from finetune.adapters.inserted import InsertedAdapter
from finetune.adapters.layout import Layout
from finetune.adapters.own_format import as_saved, own_settings
from finetune.adapters.prompt_start import StartConfig
from finetune.structure.experiments import in_mode

STRUCTURAL = ("prefix_length", "train_also")
"""Settings that decide which tensors there are."""
SPREAD = 0.02
"""Standard deviation of a random start: that of most models' own embeddings."""


@dataclass
class PreLayerConfig(StartConfig):
    """PreLayer.

    With `path`, the saved adapter decides prefix_length and train_also.
    """

    name: str = "prelayer"
    learning_rate: float = 0.2

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and broken settings."""
        as_saved(self, directory, STRUCTURAL)


class PreLayerAdapter(InsertedAdapter):
    """PreLayer attached to a model; see `PreLayerConfig`."""

    config: PreLayerConfig

    def __init__(self, config: PreLayerConfig, model: nn.Module) -> None:
        # What a block reads, while its graph lives: where blocks are recomputed, nobody has entered the stack before.
        self._layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        super().__init__(config, model)

    def inserted(self) -> Tensor:
        """[L, H]: zeros, for the first layer replaces them."""
        parameter = next(self.encoder.parameters())
        return torch.zeros(self.config.prefix_length, self.width, dtype=parameter.dtype, device=parameter.device)

    def saved_shape(self) -> tuple[int, int, int]:
        """[N, L, H]."""
        config: Any = self.model.config
        return len(self.blocks), self.config.prefix_length, int(config.get_text_config().hidden_size)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the layers that the virtual positions go through."""
        return self.structure.stacks[0].blocks

    def make_encoder(self) -> PromptEncoder:
        """The hidden states themselves, [N, L, H]."""
        return Materialised(self.start())

    @torch.no_grad()
    def start(self) -> Tensor:
        """Hidden states of tokens, or noise."""
        embedding: Any = self.embedding()
        if embedding.weight.is_meta:
            return torch.empty(self.saved_shape())
        ids_L = self.config.start_ids(embedding.weight.shape[0])
        if ids_L is None:
            return torch.randn(self.saved_shape()) * SPREAD
        return self._read(ids_L.to(embedding.weight.device))

    def _read(self, ids_L: Tensor) -> Tensor:
        """[N, L, H], float32 on the CPU: what each block is given when the model reads these tokens."""
        seen: list[Tensor] = []
        stack = self.model.get_submodule(self.structure.stacks[0].name)
        blocks = [self.model.get_submodule(name) for name in self.blocks]
        hooks = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(_hidden(module, args, kwargs)[0].float().cpu()),
                with_kwargs=True,
            )
            for block in blocks
        ]
        try:
            with in_mode(stack, training=False):
                stack(input_ids=ids_L[None])
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(seen)

    def hooks(self) -> Iterator[Removable]:
        """Those of every such method, and one before each block."""
        yield from super().hooks()
        for number, name in enumerate(self.blocks):
            block = self.model.get_submodule(name)
            yield block.register_forward_pre_hook(self._before_block(number), with_kwargs=True)

    def _before_block(self, number: int) -> Callable[..., Any]:
        """Replace what a block reads at the virtual positions."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden_BTH = _hidden(module, args, kwargs)
            if self._layout is not None and torch.is_grad_enabled():
                self._layouts[hidden_BTH] = self._layout
            layout: Layout | None = self._layout or self._layouts.get(hidden_BTH)
            if layout is None or not self.enabled:
                return None
            values_NLH: Tensor = self.encoder()
            values_LH = values_NLH[number].to(device=hidden_BTH.device, dtype=hidden_BTH.dtype)
            replaced_BTH = layout.replace(hidden_BTH, values_LH)
            if args:
                return (replaced_BTH, *args[1:]), kwargs
            return args, kwargs | {_first(module): replaced_BTH}

        return hook

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json: PEFT has no such method."""
        return own_settings(self.config)


def _first(module: nn.Module) -> str:
    """Name of a block's first argument, its hidden states."""
    return next(iter(inspect.signature(module.forward).parameters))


def _hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    hidden_BTH: Tensor = args[0] if args else kwargs[_first(module)]
    return hidden_BTH


@ADAPTERS.register(PreLayerConfig)
def build(config: PreLayerConfig, model: nn.Module) -> PreLayerAdapter:
    """Attach PreLayer to a model; `config.path` decides the structure here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = as_saved(config, Path(config.path), STRUCTURAL)
    return PreLayerAdapter(config, model)
