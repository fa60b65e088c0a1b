"""Adapters that insert virtual positions before every row: prompt tuning, P-tuning v1 and PreLayer.

One mechanism, two hooks. Before the module that takes the tokens in (`structure.stacks`), tokens become embeddings and
the virtual positions are set in among them, in mask, positions and token types as well; behind it they are dropped
again, so that logits and hidden states have the columns of the real tokens and nobody outside knows.

With a cache, they are inserted where it is still empty; from then on it holds them, and masks and positions, which come
from the tokens alone, are moved by as many. Two outputs keep the virtual positions. An encoder's, where a decoder reads
it: cross-attention sees them (the decoder's mask is widened). And that of an encoder under a task's head, which may
pool the first position: that is then a virtual one, as in PEFT; what comes out of the head has them dropped.

Shape suffixes: B rows, S real positions, L virtual positions, T all positions, H features, N rows times positions.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.input import InputAdapter, InputConfig, Removable, by_name
from finetune.adapters.layout import Ahead, Between, Layout
from finetune.errors import ConfigError


class InsertedAdapter(InputAdapter):
    """Virtual positions before every row."""

    def __init__(self, config: InputConfig, model: nn.Module) -> None:
        self._layout: Layout | None = None
        self._kept: Layout | None = None
        super().__init__(config, model)

    def check(self) -> None:
        """Refuse a model that takes nothing in but tokens."""
        if not self.structure.stacks:
            raise ConfigError(f"adapter={self.config.name} needs a model with blocks that takes inputs_embeds")
        stack = self.model.get_submodule(self.structure.stacks[0].name)
        if "inputs_embeds" not in inspect.signature(stack.forward).parameters or self.embedding() is None:
            raise ConfigError(
                f"adapter={self.config.name} needs a model that takes inputs_embeds: {type(stack).__name__} does not"
            )

    @property
    def in_peft(self) -> bool:
        """Not for a decoder's classifier; see `peft_obstacle`."""
        return super().in_peft and not self.peft_obstacle

    @property
    def peft_obstacle(self) -> str:
        """PEFT hands embeddings instead of tokens over, in which a decoder's classifier finds no padding."""
        if not super().in_peft:
            return "PEFT has no such method"
        if self.structure.task_head and self.structure.stacks[-1].causal:
            return "under this method PEFT's classifier of a decoder reads the last position of a row, padding or not"
        return ""

    @abstractmethod
    def inserted(self) -> Tensor:
        """[L, H]: what stands for the embeddings of the virtual positions."""

    def embedding(self) -> nn.Module | None:
        """What turns the tokens of the first stack into embeddings."""
        stack = self.model.get_submodule(self.structure.stacks[0].name)
        own = getattr(stack, "get_input_embeddings", None)
        found = own() if callable(own) else None
        if found is None and self.structure.embeddings is not None:
            found = self.model.get_submodule(self.structure.embeddings)
        return found

    @property
    def width(self) -> int:
        """Features of an embedding."""
        embedding: Any = self.embedding()
        return int(embedding.weight.shape[1])

    def hooks(self) -> Iterator[Removable]:
        """Around the first stack; before one that reads it; behind the model where its head sees everything."""
        first, *others = self.structure.stacks
        stack = self.model.get_submodule(first.name)
        self._signature = inspect.signature(stack.forward)
        self._keeps = any(other.reads for other in others) or (bool(self.structure.task_head) and not first.causal)
        yield stack.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield stack.register_forward_hook(self._leave)
        for other in others:
            if other.reads:
                reader = self.model.get_submodule(other.name)
                yield reader.register_forward_pre_hook(self._before_reader(reader), with_kwargs=True)
        if self._keeps and not others:
            yield self.model.register_forward_hook(self._behind_head)

    def _enter(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Arguments of the stack with the virtual positions in them."""
        self._layout = self._kept = None
        if not self.enabled:
            return None
        call = by_name(self._signature, args, kwargs)
        cache = call.get("past_key_values")
        if getattr(cache, "is_compileable", False) or isinstance(call.get("attention_mask"), Mapping):
            raise ConfigError(
                f"adapter={self.config.name} needs a cache that grows, for its {self.virtual_tokens} virtual tokens:"
                f" {type(cache).__name__} does not, leave cache_implementation out"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        return (), (self._continued(call, seen) if seen else self._begun(call))

    def _begun(self, call: dict[str, Any]) -> dict[str, Any]:
        """Nothing is in the cache yet: insert."""
        embedding: Any = self.embedding()
        real_BSH = call["inputs_embeds"] if call.get("inputs_embeds") is not None else embedding(call["input_ids"])
        mask, positions_BS, types_BS = (call.get(k) for k in ("attention_mask", "position_ids", "token_type_ids"))
        layout = self._lay(real_BSH.shape[0], real_BSH.shape[1], mask, positions_BS)
        self._layout = layout
        virtual_LH = self.inserted().to(device=real_BSH.device, dtype=real_BSH.dtype)
        call |= {"input_ids": None, "inputs_embeds": layout.join(virtual_LH, real_BSH)}
        if mask is not None:
            call["attention_mask"] = layout.mask(mask)
        if positions_BS is not None:
            call["position_ids"] = layout.positions(positions_BS)
        if types_BS is not None:
            call["token_type_ids"] = layout.spread(types_BS)
        return call

    def _lay(self, batch: int, real: int, mask: Tensor | None, positions: Tensor | None) -> Layout:
        """Where the virtual positions of some rows stand.

        Rows are packed where positions restart and no mask of tokens says otherwise, as in transformers. A row that is
        padded on the left has them behind the padding, which counts in a sliding window; where nobody tells positions,
        they are in front of it, as in PEFT.
        """
        if mask is not None and mask.dim() != 2 and not self.structure.stacks[0].causal:
            raise ConfigError(f"adapter={self.config.name} takes no explicit mask where attention looks both ways")
        if positions is None or positions.dim() != 2:
            return Ahead(self.virtual_tokens, real)
        if mask is not None and mask.dim() == 2:
            if bool(mask[:, 0].all()):
                return Ahead(self.virtual_tokens, real)
            first_B1 = mask.ne(0).int().argmax(dim=1, keepdim=True)
            return Between(self.virtual_tokens, torch.zeros_like(mask, dtype=torch.bool).scatter_(1, first_B1, True))
        starts_BS = positions.expand(batch, -1) == 0
        if not bool(starts_BS[:, 1:].any()):
            return Ahead(self.virtual_tokens, real)
        return Between(self.virtual_tokens, torch.cat([torch.ones_like(starts_BS[:, :1]), starts_BS[:, 1:]], dim=1))

    def _continued(self, call: dict[str, Any], seen: int) -> dict[str, Any]:
        """The cache holds the virtual positions: mask and positions are moved by as many."""
        tokens = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        real = seen - self.virtual_tokens + tokens.shape[1]
        told = real
        if mask is not None:
            told = mask.shape[1] if mask.dim() == 2 else -1
        elif positions is not None and positions.dim() == 2:
            told = int(positions.max()) + 1
        if told != real:
            # Given a cache, transformers cuts off as many tokens of a prompt as the cache has positions.
            raise ConfigError(
                f"the cache and the {tokens.shape[1]} tokens to read make {real} without the {self.virtual_tokens}"
                f" virtual tokens of adapter={self.config.name}, but the call is about {told}: generate without"
                " past_key_values of an earlier call"
            )
        if mask is not None:
            call["attention_mask"] = self._lay(mask.shape[0], mask.shape[1], mask, positions).mask(mask)
        if positions is not None:
            call["position_ids"] = positions + self.virtual_tokens
        return call

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Drop the virtual positions where nobody behind the stack needs them."""
        layout, self._layout = self._layout, None
        if self._keeps:
            self._kept = layout
            return None
        return None if layout is None else without(output, layout)

    def _behind_head(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Drop them from what a task's head has made of each position."""
        layout, self._kept = self._kept, None
        return None if layout is None else without(output, layout)

    def _before_reader(self, reader: nn.Module) -> Callable[..., Any]:
        """Widen a decoder's mask over what its encoder put out."""
        signature = inspect.signature(reader.forward)

        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            call = by_name(signature, args, kwargs)
            mask, states_BTH = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
            if not self.enabled or mask is None or states_BTH is None or mask.dim() != 2:
                return None
            missing = states_BTH.shape[1] - mask.shape[1]
            if missing:
                call["encoder_attention_mask"] = Ahead(missing, mask.shape[1]).mask(mask)
            return (), call

        return hook


def without(output: Any, layout: Layout) -> Any:
    """What a module of transformers puts out, without the virtual positions: in hidden states, logits and what routers
    say, [B, T, ...] or [B T, ...]. Attention weights [B, heads, T, K] lose them as queries and keep them as keys."""

    def drop(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(drop(entry) for entry in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.dim() == 4 and value.shape[2] == layout.total:
            return layout.keep(value.transpose(1, 2)).transpose(1, 2)
        if value.dim() == 3 and value.shape[1] == layout.total:
            return layout.keep(value)
        if value.dim() == 2 and value.shape[0] == batch * layout.total:
            return layout.keep(value.unflatten(0, (batch, layout.total))).flatten(0, 1)
        return value

    values = output if isinstance(output, tuple) else tuple(output.values())
    batch = next(v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 1)
    if isinstance(output, tuple):
        return drop(output)
    return type(output)(**{key: drop(value) for key, value in output.items()})
