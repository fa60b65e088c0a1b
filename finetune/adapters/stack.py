"""Stack: several methods in one model at once, each over those before it.

`adapter=stack adapter.parts=[{name: lora, rank: 8}, {name: ia3}]` trains them together. Where two parts stand at one
projection, the later takes what the earlier gives: with LoRA and (IA)^3 that is l o (W x + s B A x). Which pairs may
meet is said by the modules themselves (`Mounted.over`, `Mounted.under`); any other pair is refused, naming both.

On disk a stack is adapter_config.json with the names of its parts and a directory for each, which is that method's own
and loads alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS, Adapter, AdapterConfig, Originals
from finetune.adapters.documents import write_document
from finetune.adapters.meeting import check_parts, share_heads
from finetune.adapters.mounting import check_bare
from finetune.adapters.parts import labels, read_part, stray_keys
from finetune.adapters.rates import own_rate, whole_scales
from finetune.errors import ConfigError, ModelError
from finetune.quant.base import QuantConfig
from finetune.structure import inspect

METHOD = "stack"
DEFAULT = ({"name": "lora"}, {"name": "norm_tuning"})
"""LoRA and trained norms, the cheapest addition to it (LongLoRA, arXiv:2309.12307 section 3.3)."""


@dataclass
class StackConfig(AdapterConfig):
    """Several methods at once. `dtype` and `allow_other_quant` hold for each part that does not set its own.

    With `path`, the saved stack decides which parts there are; `parts` may then be left out, or name the same ones to
    set what belongs to the training (dropout).

    Attributes:
        parts: settings of each method, with its `name`; from Python its config will do as well.
        train_also: trained and saved beside the first part.
    """

    name: str = METHOD
    # Each a mapping or an AdapterConfig, for which OmegaConf has no type.
    parts: list[Any] = field(default_factory=lambda: [dict(part) for part in DEFAULT])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._configs = self._read()

    def configs(self) -> list[AdapterConfig]:
        """The settings of each part."""
        return list(self._configs)

    def _read(self) -> list[AdapterConfig]:
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence) or not self.parts:
            raise ConfigError(
                f"adapter.parts is {self.parts!r}: expected a list such as [{{name: lora}}, {{name: ia3}}]"
            )
        named = {f"adapter.parts[{number}]": part for number, part in enumerate(self.parts)}
        strays = [line for where, part in named.items() for line in stray_keys(part, where)]
        if strays:
            raise ConfigError("; ".join(strays))
        configs = [self._config(part, where) for where, part in named.items()]
        if self.train_also:
            configs[0] = replace(configs[0], train_also=configs[0].train_also or self.train_also)
        return configs

    def _config(self, part: Any, where: str) -> AdapterConfig:
        shared = {"dtype": self.dtype, "allow_other_quant": self.allow_other_quant}
        config = part if isinstance(part, AdapterConfig) else read_part(part, where, shared)
        if isinstance(config, StackConfig):
            raise ConfigError(f"{where} is a stack itself: name its parts in adapter.parts")
        return config

    def by_label(self) -> dict[str, AdapterConfig]:
        """The settings of each part by its name in this stack; with `path`, each starts from its own directory.

        Raises:
            ModelError: when there is no stack in `path`.
            ConfigError: where `parts` names other methods than were saved.
        """
        configs = self.configs()
        if self.path is None:
            return dict(zip(labels([config.name for config in configs]), configs, strict=True))
        methods = saved_methods(Path(self.path))
        if self.parts == list(DEFAULT):
            configs = replace(self, path=None, parts=[{"name": method} for method in methods.values()]).configs()
        if [config.name for config in configs] != [*methods.values()]:
            raise ConfigError(
                f"adapter.parts has {', '.join(config.name for config in configs)}, but the adapter {self.path} is a"
                f" stack of {', '.join(methods.values())}: leave adapter.parts out"
            )
        paths = [str(Path(self.path) / label) for label in methods]
        return {n: replace(c, path=path) for n, c, path in zip(methods, configs, paths, strict=True)}

    def starts(self) -> list[AdapterConfig]:
        """Those of the parts that start from a saved adapter."""
        return [config for config in self.by_label().values() if config.path is not None]

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Whatever a part needs."""
        for config in self._configs:
            config.read_tokenizer(tokenizer)

    def check_base(self, quant: QuantConfig) -> None:
        """Whatever a part says."""
        for config in self.by_label().values():
            config.check_base(quant)

    def check_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whatever a part says that starts fresh."""
        for config in self.by_label().values():
            if config.path is None:
                config.check_stored(shapes)


class Stack(Adapter):
    """Several adapters mounted in one model, each over those before it.

    A head made for the task trains in all of them as one: the later parts take over the first one's.

    Args:
        config: says which they are; read here no more.
        model: bare.
        parts: by name, in order; attached to the model and unmounted.

    Raises:
        ConfigError: for two parts that cannot meet, naming both; the model is then as it was.
    """

    config: StackConfig

    def __init__(self, config: StackConfig, model: nn.Module, parts: Mapping[str, Adapter]) -> None:
        check_bare(model)
        self.task_head = inspect(model).task_head
        check_parts(parts, self.task_head)
        self.config, self.model, self.members = config, model, dict(parts)
        share_heads(parts, self.task_head)
        self.mount()
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains in any part, by its full name in this stack."""
        return dict(self._trainable)

    @property
    def note(self) -> str:
        """What the parts have to say."""
        return "; ".join(part.note for part in self.members.values() if part.note)

    def initialise(self, originals: Originals | None = None) -> None:
        """Start each part: from its saved adapter, or as a fresh one."""
        for part in self._alone():
            if part.config.path is not None:
                part.load(Path(part.config.path))
            else:
                part.initialise(originals)

    @property
    def keeps_start(self) -> bool:
        """Whether one of the parts does."""
        return any(part.keeps_start for part in self.members.values())

    @property
    def starts_as_base(self) -> bool:
        """Whether all of the parts do."""
        return all(part.starts_as_base for part in self.members.values())

    def learning_rate_scales(self) -> dict[str, float]:
        """Those of the parts, by the names in this stack: each learns at the rate that suits its method there, and
        `learning_rate` of the stack moves all of them."""
        plain = own_rate(self) * type(self.config).learning_rate / self.config.learning_rate
        names = {id(parameter): name for name, parameter in self._trainable.items()}
        scales: dict[str, float] = {}
        for part in self.members.values():
            tensors, rate = part.trainable(), own_rate(part)
            own = dict.fromkeys(tensors, 1.0) | whole_scales(part) | part.learning_rate_scales()
            scales |= {names[id(tensors[name])]: scale * rate / plain for name, scale in own.items()}
        return scales

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it no part changes anything."""
        with ExitStack() as within:
            for part in self.members.values():
                within.enter_context(part.disabled())
            yield

    def mount(self) -> None:
        """Mount the parts, each over those before it."""
        for level, part in enumerate(self.members.values()):
            for module in part.places().values():
                module.level = level
            part.mount()

    def unmount(self) -> None:
        """Unmount the parts, the outermost first."""
        for part in reversed([*self.members.values()]):
            part.unmount()

    def _alone(self) -> Iterator[Adapter]:
        """Each part in turn, as the only one that is mounted."""
        self.unmount()
        try:
            for part in self.members.values():
                part.mount()
                try:
                    yield part
                finally:
                    part.unmount()
        finally:
            self.mount()

    @property
    def virtual_tokens(self) -> int:
        """Those of the part that has some."""
        return sum(part.virtual_tokens for part in self.members.values())

    def training_obstacle(self, *, gradient_checkpointing: bool, packing: bool) -> str:
        """The first that a part names."""
        found = (
            part.training_obstacle(gradient_checkpointing=gradient_checkpointing, packing=packing)
            for part in self.members.values()
        )
        return next((obstacle for obstacle in found if obstacle), "")

    @property
    def mergeable(self) -> bool:
        """Where every part merges."""
        return all(part.mergeable for part in self.members.values())

    @property
    def obstacle(self) -> str:
        """Which parts do not merge, and why."""
        found = [f"of its part {name}: {part.obstacle}" for name, part in self.members.items() if not part.mergeable]
        return "; ".join(found)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """As every adapter; what several parts change comes once, with all of it merged in their order.

        Raises:
            ConfigError: where a part does not merge.
        """
        if not self.mergeable:
            raise ConfigError(f"adapter={METHOD} does not merge: {self.obstacle}")
        parts = list(self.members.values())
        for number, part in enumerate(parts):
            later = {name for other in parts[number + 1 :] for name in other.places()}
            for name, weight in part.merged():
                around = {name, *(name[:end] for end, sign in enumerate(name) if sign == ".")}
                if not later & around:
                    yield name, weight

    def save(self, directory: Path) -> None:
        """Write adapter_config.json and each part into a directory of its name."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for label, part in zip(self.members, self._alone(), strict=True):
            part.save(directory / label)
        parts = [{"directory": label, "method": part.config.name} for label, part in self.members.items()]
        write_document(directory / peft_format.CONFIG, {peft_format.OWN_METHOD: METHOD, "parts": parts})

    def load(self, directory: Path) -> None:
        """Fill every part from the stack that `save` wrote.

        Raises:
            ModelError: when it is another stack, or a part does not fit.
        """
        directory = Path(directory)
        saved = saved_methods(directory)
        mine = {label: part.config.name for label, part in self.members.items()}
        if [*saved.items()] != [*mine.items()]:
            theirs, ours = ", ".join(saved.values()), ", ".join(mine.values())
            raise ModelError(f"adapter {directory} is a stack of {theirs}: expected {ours}")
        for label, part in zip(self.members, self._alone(), strict=True):
            part.load(directory / label)


def saved_methods(directory: Path) -> dict[str, str]:
    """The parts of a saved stack, in order: directory -> method.

    Raises:
        ModelError: when there is no stack.
    """
    saved = peft_format.read_settings(directory)
    peft_format.check_method(directory, saved, {peft_format.OWN_METHOD: METHOD})
    parts = saved.get("parts")
    try:
        methods = {str(part["directory"]): str(part["method"]) for part in parts}  # type: ignore[union-attr]
    except (TypeError, KeyError):
        methods = {}
    if not methods or any(Path(label).name != label or label in (".", "..") for label in methods):
        path = directory / peft_format.CONFIG
        raise ModelError(f"{path} has parts {parts!r}: expected directory and method of each part of a stack")
    return methods


@ADAPTERS.register(StackConfig)
def build(config: StackConfig, model: nn.Module) -> Stack:
    """Attach every part by itself, then all of them together; their values come by `load` or `initialise`."""
    check_bare(model)
    parts: dict[str, Adapter] = {}
    for label, part in config.by_label().items():
        parts[label] = ADAPTERS.build(part, model)
        parts[label].unmount()
    return Stack(config, model, parts)
