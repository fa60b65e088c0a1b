"""Adapters that stand before the text: what the model reads, or remembers, ahead of the first token of every row.

A method of this kind is one file: a config, what trains (`make_encoder`), and the hooks by which the model meets it
(`hooks`). Freezing, `train_also`, mounting, disabling, saving and loading are the same for all of them and live here.

What trains is mounted as the model's child `prompt_encoder`, so that it follows the model's mode and its tensors have
names of their own. It may compute what the model meets from something larger (a reparametrisation); what is saved is
what came out of it, so a saved adapter that is started from trains that directly.
"""

from __future__ import annotations

import inspect as signatures
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.attached import AttachedAdapter
from finetune.adapters.base import DTYPES, AdapterConfig
from finetune.adapters.full_copy import build_copies, file_keys, trained_whole
from finetune.adapters.mounting import Mounted, check_bare, lift, place, switched_off
from finetune.errors import ConfigError
from finetune.structure import inspect

PROMPT = "prompt_encoder"
"""Name of the model's child that trains; PEFT calls it so as well."""
EMBEDDINGS = "prompt_embeddings"
"""The one key of PEFT's files for methods of this kind, besides modules trained whole."""
PREFIX = "base_model."
"""Before the names of these; other methods of PEFT put a module more around the model."""


class Removable(Protocol):
    """A handle on a hook."""

    def remove(self) -> None:
        """Take the hook away."""


@dataclass
class InputConfig(AdapterConfig):
    """An adapter that stands before the text.

    Attributes:
        prefix_length: virtual tokens before every row; they count against the model's context.
    """

    by_width: ClassVar[bool] = False
    beside_head: ClassVar[float] = 0.25
    """A step on rows of one label each has little to say, and what it says of a head that knows nothing yet is noise:
    at the rate for text, virtual tokens drown what the head reads before it has learnt to read it."""

    prefix_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_length < 1:
            raise ConfigError(f"adapter.prefix_length is {self.prefix_length}: expected at least 1 virtual token")


class PromptEncoder(Mounted):
    """What trains, and how it gives what the model meets."""

    @abstractmethod
    def forward(self) -> Tensor:
        """What the model meets, in the dtype of the trained tensors; the shape is the method's."""

    @abstractmethod
    def learning_rate_scales(self, ratio: float) -> dict[str, float]:
        """Factors on the learning rate, by names of the own parameters.

        Args:
            ratio: for what the model meets as it is, beside its size.
        """


class Materialised(PromptEncoder):
    """What the model meets, trained as it is."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        """The trained tensor."""
        return self.values

    def learning_rate_scales(self, ratio: float) -> dict[str, float]:
        """A share of the tensor's own size."""
        return {"values": ratio * size(self.values)}


class InputAdapter(AttachedAdapter):
    """Hooks something trained before the text.

    Args:
        config: of the method; where `path` is set its tensors are loaded later, into a `Materialised` of their shape.
        model: of transformers, frozen or dense; it is frozen whatever it was.

    Raises:
        ConfigError: for modules that match nothing, a model that is adapted already or cannot carry the method.
    """

    config: InputConfig

    def __init__(self, config: InputConfig, model: nn.Module) -> None:
        self.config, self.model = config, model
        check_bare(model)
        self.structure = inspect(model)
        whole = trained_whole(model, self.structure, config.train_also)
        self.check()
        model.requires_grad_(False)
        dtype = DTYPES[config.dtype]
        self.copies = build_copies(model, self.structure, whole, dtype)
        encoder = self.make_encoder() if config.path is None else Materialised(torch.zeros(self.saved_shape()))
        # Drawn on the CPU in float32, so that a seed gives the same start on every device.
        device = next(p for p in model.parameters() if p.device.type != "meta").device if _placed(model) else "meta"
        self.encoder = encoder.to(device=device, dtype=dtype).requires_grad_(True).train(model.training)
        self.enabled = True
        self._handles: list[Removable] = []
        self.mount()
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def check(self) -> None:
        """Refuse a model that cannot carry the method, before it is touched.

        Raises:
            ConfigError: saying what it lacks.
        """

    @abstractmethod
    def make_encoder(self) -> PromptEncoder:
        """What trains, freshly initialised, float32 on the CPU, drawn from torch's global generator."""

    @abstractmethod
    def saved_shape(self) -> tuple[int, ...]:
        """Shape of `prompt_embeddings` as it is saved (PEFT's, where it has the method)."""

    @abstractmethod
    def hooks(self) -> Iterator[Removable]:
        """Register the hooks by which the model meets `self.encoder()`; silent while `self.enabled` is False."""

    @property
    def virtual_tokens(self) -> int:
        """The configured length."""
        return self.config.prefix_length

    @property
    def starts_as_base(self) -> bool:
        """Rows begin with something that was not there."""
        return False

    def disabled(self) -> AbstractContextManager[None]:
        """Within it nothing stands before the text, and whole modules compute with their stored weights."""
        return switched_off([self, *self.copies.values()])

    def mount(self) -> None:
        """Add what trains to the model and hook it in."""
        self.encoder.method = self.config.name
        self.model.add_module(PROMPT, self.encoder.train(self.model.training))
        place(self.model, self.copies, self.config.name)
        self._handles = list(self.hooks())

    def unmount(self) -> None:
        """Take hooks and modules out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        lift(self.model, self.copies)
        delattr(self.model, PROMPT)

    def places(self) -> dict[str, Mounted]:
        """What trains before the text, and copies that train."""
        return {PROMPT: self.encoder, **self.copies}

    @property
    def mergeable(self) -> bool:
        """What stands before the text is no weight of the base."""
        return False

    @property
    def obstacle(self) -> str:
        """Why."""
        return "what stands before the text is no weight of the base"

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"adapter={self.config.name} does not merge: {self.obstacle}")

    def file_keys(self) -> dict[str, nn.Parameter]:
        """What trains as the model meets it, as PEFT names it, and what whole modules add."""
        met = {EMBEDDINGS: self.encoder.values} if isinstance(self.encoder, Materialised) else {}
        return met | self.copy_keys()

    def copy_keys(self) -> dict[str, nn.Parameter]:
        """The part of `file_keys` that modules trained whole add."""
        return file_keys(self.copies, PREFIX)

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, with what the model meets under one key."""
        training = self.encoder.training
        values = nn.Parameter(self.encoder.eval()().reshape(self.saved_shape()), requires_grad=False)
        self.encoder.train(training)
        peft_format.write(Path(directory), {EMBEDDINGS: values, **self.copy_keys()}, self.file_config())

    def fill(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into an adapter that was attached with `path`.

        Raises:
            ModelError: for missing, unexpected or mis-shaped tensors.
            ConfigError: where it was attached fresh, with an encoder that the file does not hold.
        """
        if not isinstance(self.encoder, Materialised):
            shapes = {EMBEDDINGS: self.saved_shape()} | {key: tuple(p.shape) for key, p in self.copy_keys().items()}
            peft_format.check_tensors(directory, shapes, tensors)
            raise ConfigError(
                f"a fresh adapter={self.config.name} has an encoder that {directory} does not hold: set adapter.path"
            )
        super().fill(directory, tensors)

    @property
    def ratio(self) -> float:
        """How many times as fast as the rate of the run what trains as the model meets it learns."""
        return 1.0

    def learning_rate_scales(self) -> dict[str, float]:
        """Those of the encoder."""
        scales = self.encoder.learning_rate_scales(self.ratio)
        return {f"{PROMPT}.{name}": scale for name, scale in scales.items()}


def size(values: Tensor) -> float:
    """Root mean square, what Adam's steps are to be measured by; 1 for zeros.

    Adam moves every number by about the learning rate. Embeddings and hidden states are of quite different sizes from
    base to base: a rate suits them only as a share of what is there.
    """
    return float(values.detach().float().square().mean().sqrt()) or 1.0


def by_name(signature: signatures.Signature, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all of them by name."""
    call = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is signatures.Parameter.VAR_KEYWORD:
            call |= call.pop(parameter.name, {})
    return call


def _placed(model: nn.Module) -> bool:
    """Whether the model has weights at all."""
    return any(parameter.device.type != "meta" for parameter in model.parameters())
