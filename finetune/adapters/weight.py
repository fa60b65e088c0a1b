"""Adapters that sit on a projection: the frozen weight stays, something small beside it trains.

A method of this kind is one file: a config, what it makes of one linear layer (`AdaptedLinear`), and a `WeightAdapter`
that says how to wrap. Targets, freezing, `train_also`, saving, loading, merging and disabling are the same for all of
them and live here. docs/new-adapter.md shows a whole one.

Shape suffixes: B leading dimensions, O out features, I in features, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.adapted import AdaptedExperts, AdaptedWeight, WrappedLinear
from finetune.adapters.attached import AttachedAdapter
from finetune.adapters.base import DTYPES, AdapterConfig
from finetune.adapters.full_copy import FullCopy, build_copies, trained_whole
from finetune.adapters.mounting import Mounted, check_bare, lift, place, switched_off
from finetune.adapters.own_format import own_settings
from finetune.adapters.targets import ALL_LINEAR, check_embedding, check_targets, select
from finetune.errors import ConfigError, ModelError
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.quant.pruned import mark_pruned
from finetune.structure import Projection, Structure, embedding_projection, head_projection, inspect


@dataclass
class WeightConfig(AdapterConfig):
    """An adapter that sits on projections.

    Attributes:
        targets: `all-linear` for every projection inside the blocks, or a list of names (the last part or parts of
            the dotted name) and globs, each of which must match something. The head is adapted only where a pattern
            names it, the token embedding only by its name and where the method has a form for it.
    """

    target_words: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)
    """What `targets` may be besides a list."""
    embeds: ClassVar[bool] = False
    """Whether the method has a form for the token embedding."""

    # OmegaConf has no type for "a string or a list of strings".
    targets: Any = ALL_LINEAR

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.targets, self.target_words)


class WeightAdapter(AttachedAdapter):
    """Wraps the targeted projections of a model in place.

    Args:
        config: of the method; `path` is not read here.
        model: a causal language model of transformers, frozen or dense; it is frozen whatever it was.
        plan: the projections to adapt; by default what `config.targets` selects.

    Raises:
        ConfigError: for targets or modules that match nothing or cannot be adapted, or a model that is adapted already.
    """

    config: WeightConfig

    def __init__(self, config: WeightConfig, model: nn.Module, plan: list[Projection] | None = None) -> None:
        self.config, self.model = config, model
        check_bare(model)
        self.structure = inspect(model)
        self.projections = plan if plan is not None else choose(model, self.structure, config)
        whole = trained_whole(model, self.structure, config.train_also)
        both = sorted({p.name for p in self.projections} & set(whole))
        if both:
            raise ConfigError(
                f"adapter.train_also and adapter.targets both name {both[0]}: leave it out of one of them"
            )
        parts = {name: leaves for name, leaves in self.select().items() if name not in whole}
        self.check()
        self.names = tuple(name for name, _ in model.named_modules())
        freeze_dense(model, self.structure, self.projections)
        mark_pruned(model)
        model.requires_grad_(False)
        dtype = DTYPES[config.dtype]
        self.copies = build_copies(model, self.structure, whole, dtype)
        self.copies |= {n: FullCopy(model.get_submodule(n), dtype, leaves) for n, leaves in parts.items()}
        self.adapted = {p.name: self._wrapped(p, dtype) for p in self.projections}
        self.followed = {name: self._trained(module, dtype) for name, module in self.further().items()}
        self.adapted |= self.followed
        self.mount()
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @abstractmethod
    def wrap(self, base: FrozenLinear, projection: Projection) -> WrappedLinear:
        """What stands in the model for one frozen linear layer."""

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> AdaptedExperts:
        """What stands in the model for a stack of experts; a method without a form for them leaves this as it is."""
        raise ConfigError(
            f"adapter={self.config.name} cannot adapt stacked experts such as {projection.name}:"
            f" leave them out of adapter.targets"
        )

    def wrap_embedding(self, base: nn.Embedding, projection: Projection) -> AdaptedWeight:
        """What stands for the token embedding; a method that `embeds` has a form for it."""
        raise ConfigError(
            f"adapter={self.config.name} cannot adapt the token embedding {projection.name}: leave it out of"
            f" adapter.targets"
        )

    def further(self) -> dict[str, AdaptedWeight]:
        """What stands for further modules, by name: for methods that also follow what is no projection."""
        return {}

    def select(self) -> dict[str, tuple[str, ...]]:
        """Further modules that train, by name, each with those of its own parameters that do; see select.py."""
        return {}

    def check(self) -> None:
        """Refuse settings that the chosen projections do not allow, before the model is touched."""

    def _wrapped(self, projection: Projection, dtype: torch.dtype) -> AdaptedWeight:
        base = self.model.get_submodule(projection.name)
        wrapped: AdaptedWeight
        if isinstance(base, FrozenExperts):
            wrapped = self.wrap_experts(base, projection)
        elif isinstance(base, nn.Embedding):
            wrapped = self.wrap_embedding(base, projection)
        else:
            assert isinstance(base, FrozenLinear)
            wrapped = self.wrap(base, projection)
        return self._trained(wrapped, dtype)

    def _trained(self, wrapped: AdaptedWeight, dtype: torch.dtype) -> AdaptedWeight:
        """What is beside the base, on its device and in `dtype`, asking for gradients."""
        device = next(wrapped.base.parameters()).device
        for name, parameter in wrapped.named_parameters():
            if not name.startswith("base."):
                # Drawn on the CPU in float32, so that a seed gives the same start on every device.
                parameter.data = parameter.data.to(device=device, dtype=dtype)
                parameter.requires_grad_(True)
        # A frozen module does not know the model's mode; dropout has to.
        return wrapped.train(self.model.training)

    def disabled(self) -> AbstractContextManager[None]:
        """Within it every adapted module computes with its stored weight alone, bit for bit the base."""
        return switched_off([*self.adapted.values(), *self.copies.values()])

    def mount(self) -> None:
        """Put the adapted modules in the place of those they stand for."""
        place(self.model, self.places(), self.config.name)

    def unmount(self) -> None:
        """Put the base's modules back."""
        lift(self.model, self.places())

    def places(self) -> dict[str, Mounted]:
        """Adapted projections and modules, and copies that train."""
        return {**self.adapted, **self.copies}

    @property
    def mergeable(self) -> bool:
        """Weight adapters merge."""
        return True

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Base names and merged weights in float32, decoded from what is stored, one at a time.

        Raises:
            ConfigError: where the method does not merge.
        """
        if not self.mergeable:
            raise ConfigError(f"adapter={self.config.name} does not merge: {self.obstacle}")
        for projection in self.projections:
            for leaf, tensor in self.adapted[projection.name].merged():
                if projection.kind == "experts":
                    yield projection.name, tensor
                else:
                    turned = projection.transposed and leaf == "weight"
                    yield f"{projection.name}.{leaf}", tensor.T.contiguous() if turned else tensor
        for name, module in self.followed.items():
            yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in module.merged())
        for name, whole in self.copies.items():
            for leaf, parameter in whole.trains():
                yield f"{name}.{leaf}", parameter.detach().to(torch.float32, copy=True)

    def file_keys(self) -> dict[str, nn.Parameter]:
        """Keys of adapter_model.safetensors and the parameters they fill; tied modules have a key each."""
        keys = {}
        for name, module in self.adapted.items():
            own = ((leaf, p) for leaf, p in module.named_parameters() if not leaf.startswith("base."))
            keys.update({f"{peft_format.PREFIX}{name}.{leaf}": p for leaf, p in own})
        return keys | self.copy_keys()

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json of a method that PEFT does not have: the settings themselves."""
        return own_settings(self.config)

    def save(self, directory: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""
        peft_format.write(Path(directory), self.file_keys(), self.file_config())

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a file whose settings would make its tensors mean something else here.

        What the tensors' names and shapes say is checked by them; a method whose settings include some that do not
        matter once it is trained overrides this.

        Raises:
            ModelError: naming the setting and both values.
        """
        for key, mine in self.file_config().items():
            if key not in ("dtype", "targets", "train_also") and saved.get(key) != mine:
                raise ModelError(f"adapter {directory} has {key} {saved.get(key)!r}, but here it is {mine!r}")


def choose(model: nn.Module, structure: Structure, config: WeightConfig) -> list[Projection]:
    """The projections that `config.targets` selects.

    Raises:
        ConfigError: for a pattern that matches nothing, a token embedding that the method has no form for, or a head or
            an embedding whose weight is tied.
    """
    head, embedding = head_projection(model, structure), embedding_projection(model, structure)
    chosen = select(structure.projections, config.targets, head, embedding)
    if head in chosen and structure.tied:
        raise ConfigError(
            f"adapter.targets names {structure.head}, whose weight is tied to {structure.embeddings}: merging would"
            f" change both; use adapter.train_also=[{structure.head}, {structure.embeddings}]"
        )
    if embedding is not None and embedding in chosen:
        check_embedding(config.name, config.embeds, embedding, structure)
    return chosen


def freeze_dense(model: nn.Module, structure: Structure, projections: list[Projection]) -> None:
    """Give projections that are still plain modules or parameters the frozen form of their own dense weight."""
    from finetune.quant.dense import DenseConfig
    from finetune.quant.freeze import freeze

    dense = [p for p in projections if p.kind != "embedding"]
    plain = tuple(p for p in dense if not isinstance(_at(model, p.name), FrozenWeight))
    if plain:
        freeze(model, DenseConfig(), replace(structure, projections=plain))


def _at(model: nn.Module, name: str) -> object:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
