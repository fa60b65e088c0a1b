"""Adapters that put trained keys and values before those of the text, in the attention of every block.

Prefix tuning and P-tuning v2. Trained keys are not rotated and real tokens take the positions after them, as if the
model had read a text of that length. Which way they get there is decided by an experiment on a twin of the model
without weights: through transformers' attention interface (key_value_attention.py) where its attention goes by it, else
in a cache that is handed in (key_value_cache.py). Of an encoder and a decoder, the decoder's attention over its own
text gets them, as in PEFT.

On disk they have PEFT's layout, [L, 2 N H D]: of each block the keys, then the values.

Shape suffixes: L virtual tokens, N blocks, H heads of keys and values, D features of a head, K = H D, M width of the
reparametrisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters import key_value_attention, key_value_cache, peft_prompts
from finetune.adapters.input import InputAdapter, Materialised, PromptEncoder, Removable, size
from finetune.adapters.prompt_start import DrawnConfig
from finetune.adapters.saved_prompt import agreed
from finetune.errors import ConfigError, ModelError
from finetune.structure.attention import attending

METHOD = "PREFIX_TUNING"
"""PEFT's name."""
SHAPE = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
"""Keys of adapter_config.json that decide how its tensor is cut."""
SLIDING = "sliding_attention"
"""What transformers calls blocks whose attention has a window, in `layer_types` of a configuration."""


@dataclass
class KeyValueConfig(DrawnConfig):
    """Trained keys and values.

    With `path`, the saved adapter decides prefix_length and train_also; what trains is then the keys and values
    themselves.

    Attributes:
        init: vocabulary (what the base computes for common words, drawn uniformly) or random.
        reparametrise: whether they come out of two small layers while they are trained.
        width: features between these.
        ratio: the keys and values themselves learn at so many times train.learning_rate, as a share of their size; the
            two layers learn at the plain rate, and what comes out of them moves faster than they do.
    """

    reparametrise: bool = False
    width: int = 512
    ratio: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reparametrise, bool):
            raise ConfigError(f"adapter.reparametrise is {self.reparametrise!r}: expected true or false")
        if not isinstance(self.width, int) or self.width < 1:
            raise ConfigError(f"adapter.width is {self.width}: expected at least 1")
        if not self.ratio > 0:
            raise ConfigError(f"adapter.ratio is {self.ratio}: expected more than 0")

    def check_saved(self, directory: Path) -> None:
        """Refuse another method, settings that we do not compute, and another length than set here."""
        agreed(self, directory, METHOD)


class Reparametrised(PromptEncoder):
    """Keys and values that come out of two layers: start + W_2 tanh(W_1 e + b_1) + b_2 (Li & Liang 2021, section 4.3).

    Args:
        start: [L, 2 N K], what they are at first; it trains too.
        width: M.
        slices: how many blocks they are for.
    """

    def __init__(self, start: Tensor, width: int, slices: int) -> None:
        super().__init__()
        length, features = start.shape
        self.step = features // slices
        self.start = nn.Parameter(start)
        self.embedding = nn.Parameter(torch.randn(length, self.step // 2))
        self.first, self.second = nn.Linear(self.step // 2, width), nn.Linear(width, features)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self) -> Tensor:
        """[L, 2 N K], block by block, so that it has the bits that blocks meet."""
        blocks = self.start.shape[1] // self.step
        return torch.cat([self.columns(block * self.step, (block + 1) * self.step) for block in range(blocks)], dim=1)

    def columns(self, begin: int, end: int) -> Tensor:
        """[L, end - begin]: some columns of the whole, without the others."""
        hidden_LM = torch.tanh(self.first(self.embedding))
        moved = F.linear(hidden_LM, self.second.weight[begin:end], self.second.bias[begin:end])
        return self.start[:, begin:end] + moved

    def learning_rate_scales(self, ratio: float) -> dict[str, float]:
        """What comes out of the layers moves what they are added to by a share of its size as well."""
        share = size(self.start)
        return {"start": ratio * share, "second.weight": share, "second.bias": share}


class KeyValueAdapter(InputAdapter):
    """Trained keys and values before those of the text; see `KeyValueConfig`."""

    config: KeyValueConfig

    def check(self) -> None:
        """Find which way they can go, and how many features they have."""
        model, stacks = self.model, self.structure.stacks
        if not stacks:
            raise ConfigError(f"adapter={self.config.name} needs a model with blocks that attend")
        self.stack = stacks[-1]
        found = None if self.stack.reads else attending(model)
        obstacle = key_value_attention.obstacle(model, found)
        self.way = None if obstacle else found
        if self.way is None:
            shapes = key_value_cache.kept(model, self.stack)
        else:
            shapes = [(m.heads, m.key_width, m.value_width) for m in self.way.modules]
            shapes = shapes if [m.block for m in self.way.modules] == [*range(len(self.stack.blocks))] else []
        if not shapes:
            raise ConfigError(
                f"adapter={self.config.name} needs attention in every block that takes keys and values from outside;"
                f" this model's does not: {obstacle or 'some blocks do not attend'}, and it fills no cache"
            )
        if len(set(shapes)) > 1 or shapes[0][1] != shapes[0][2]:
            raise ConfigError(
                f"adapter={self.config.name} needs keys and values of one shape in all blocks, but this model has"
                f" {', '.join(f'{h} heads of {k} and {v}' for h, k, v in dict.fromkeys(shapes))}"
            )
        self.heads, self.head_width, _ = shapes[0]

    @property
    def features(self) -> int:
        """K."""
        return self.heads * self.head_width

    @property
    def note(self) -> str:
        """Where PEFT computes something else from the same file."""
        config: Any = self.model.config
        text = config.get_text_config()
        kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
        if not window or (kinds is not None and SLIDING not in kinds):
            return ""
        return f"adapter={self.config.name}: all tokens see the prefix; with PEFT it slides out of a window of {window}"

    def saved_shape(self) -> tuple[int, int]:
        """[L, 2 N K], as PEFT."""
        return self.config.prefix_length, 2 * len(self.stack.blocks) * self.features

    def pair(self, block: int) -> tuple[Tensor, Tensor]:
        """Key and value of a block, each [H, L, D]."""
        begin = self._row(block) * self.features
        end = begin + 2 * self.features
        encoder = self.encoder
        columns = encoder.columns(begin, end) if isinstance(encoder, Reparametrised) else encoder()[:, begin:end]
        key, value = columns.unflatten(1, (2, self.heads, self.head_width)).permute(1, 2, 0, 3)
        return key, value

    def _row(self, block: int) -> int:
        """Where the key of a block is among the 2 N rows. PEFT cuts those of a decoder in fours, of which it uses two,
        and begins anew where they end."""
        rows = 2 * len(self.stack.blocks)
        return 4 * block % rows if self.stack.reads else 2 * block

    @property
    def ratio(self) -> float:
        """As configured."""
        return self.config.ratio

    def make_encoder(self) -> PromptEncoder:
        """The keys and values themselves, or what they come out of."""
        start = self.start()
        if self.config.reparametrise:
            return Reparametrised(start, self.config.width, len(self.stack.blocks))
        return Materialised(start)

    @torch.no_grad()
    def start(self) -> Tensor:
        """[L, 2 N K]: torch's default for an embedding, or what the base computes for words of its vocabulary.

        These are the keys and values of a text of L tokens at the first positions, so that the adapted model starts as
        the base after a text without meaning.
        """
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        start_LF = torch.empty(self.saved_shape(), device="cpu").normal_()
        if self.config.init == "random" or embeddings.weight.is_meta:
            return start_LF
        ids_L = self.config.drawn_ids(embeddings.weight.shape[0])
        layers = key_value_cache.read(self.model, self.stack, ids_L.to(embeddings.weight.device)[None])
        for block, (key_1HLD, value_1HLD) in reversed(list(enumerate(layers))):
            begin = self._row(block) * self.features
            pair_L = torch.cat([half[0].transpose(0, 1).flatten(1) for half in (key_1HLD, value_1HLD)], dim=1)
            start_LF[:, begin : begin + pair_L.shape[1]] = pair_L.float().cpu()
        return start_LF

    def hooks(self) -> Iterator[Removable]:
        """Through the attention interface, or in a cache."""
        if self.way is not None:
            return key_value_attention.hooks(self.model, self.way, self)
        return key_value_cache.hooks(self.model, self.stack, self)

    def training_obstacle(self, *, gradient_checkpointing: bool, packing: bool) -> str:
        """Checkpointing, where a cache carries the keys and values: transformers recomputes blocks without one."""
        if self.way is None and gradient_checkpointing:
            return (
                f"train.gradient_checkpointing=true recomputes blocks without a cache, which is what carries"
                f" adapter={self.config.name} in this model: set it to false"
            )
        return ""

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse other shapes, and what we do not compute."""
        peft_prompts.read_saved(directory, METHOD)
        for key, mine in self.file_config().items():
            if key in SHAPE and saved.get(key) != mine:
                raise ModelError(f"adapter {directory} has {key} {saved.get(key)}, but here it is {mine}")

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it: without projection, because what is saved came out of it."""
        return peft_prompts.written(
            METHOD,
            self.model,
            self.structure,
            self.config.prefix_length,
            self.features,
            whole=list(self.copies),
            num_layers=len(self.stack.blocks),
            num_attention_heads=self.heads,
            num_transformer_submodules=2 if self.stack.reads else 1,
            prefix_projection=False,
            encoder_hidden_size=self.config.width,
        )


def attach_key_values(config: KeyValueConfig, model: nn.Module) -> KeyValueAdapter:
    """Attach to a model; `config.path` decides the length here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = agreed(config, Path(config.path), METHOD, model)
    return KeyValueAdapter(config, model)
