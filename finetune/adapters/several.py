"""Several adapters on one model: attached by name, one or some of them in use at a time.

    adapters = finetune.Adapters(model)
    adapters.attach("sql", LoRAConfig(rank=8))              # fresh; in use from here on
    adapters.attach("polite", LoRAConfig(path="runs/..."))  # saved
    adapters.use("sql")                                     # switch: modules are exchanged, nothing is copied
    adapters.use("sql", "polite")                           # both, polite over sql
    adapters.use()                                          # none: the base, bit for bit
    adapters.combine("both", {"sql": 0.7, "polite": 0.3})   # a new LoRA: 0.7 of one's product and 0.3 of the other's

What is not in use is not in the model: its parameters, state dict and `requires_grad` tell of what is in use alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter, AdapterConfig, Originals
from finetune.adapters.combination import MODES, combined
from finetune.adapters.lora import LoRAAdapter
from finetune.adapters.mounting import check_bare
from finetune.adapters.stack import Stack, StackConfig
from finetune.errors import ConfigError, nearest


class Combined(NamedTuple):
    """A combination of LoRAs.

    Attributes:
        adapter: the new one.
        error: what its products lack of the weighted sum, relative to it, over all weights (Frobenius norm).
    """

    adapter: LoRAAdapter
    error: float


class Adapters(Mapping[str, Adapter]):
    """The adapters of one model, by name.

    Args:
        model: bare; it is frozen when the first one is attached.

    Raises:
        ConfigError: where an adapter is attached to it already.
    """

    def __init__(self, model: nn.Module) -> None:
        check_bare(model)
        self.model = model
        self._held: dict[str, Adapter] = {}
        self._using: tuple[str, ...] = ()
        self._mounted: Adapter | None = None

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._held:
            have = f"have {', '.join(self._held)}" if self._held else "there is none yet"
            raise ConfigError(f"no adapter is called {name!r}: {have}{nearest(name, self._held)}")
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def using(self) -> tuple[str, ...]:
        """Names of those in use, each over those before it."""
        return self._using

    @property
    def adapter(self) -> Adapter | None:
        """What is in use, to train, save or merge it: an adapter, a stack of several, or None."""
        return self._mounted

    def attach(self, name: str, config: AdapterConfig) -> Adapter:
        """Attach an adapter, fresh or saved (`config.path`), under a name; it alone is in use from then on.

        Raises:
            ConfigError: for a name that is taken, and whatever else `attach` refuses; what was in use still is.
            ModelError: for a saved adapter that does not fit.
        """
        self._check_new(name)
        with self._bare():
            return self._start(name, attach(self.model, config, self._originals()))

    def use(self, *names: str) -> Adapter | None:
        """Use these adapters and no others: one, several as a stack (each over those before it), or none.

        Raises:
            ConfigError: for a name there is none of, or adapters that cannot stand in one model together; what was in
                use still is.
        """
        chosen = {name: self[name] for name in names}
        if len(chosen) != len(names):
            raise ConfigError(f"{', '.join(names)}: one adapter cannot be used twice at a time")
        if names != self._using:
            with self._bare():
                self._mounted, self._using = self._together(chosen), names
            self._changed()
        return self._mounted

    @contextmanager
    def only(self, *names: str) -> Iterator[Adapter | None]:
        """Within it these are in use; afterwards what was before."""
        before = self._using
        try:
            yield self.use(*names)
        finally:
            self.use(*before)

    def combine(
        self, name: str, weights: Mapping[str, float], mode: str = MODES[0], rank: int | None = None
    ) -> Combined:
        """Make a new LoRA of some that there are: sum_i w_i s_i B_i A_i at every projection. It alone is in use then.

        Args:
            weights: by name of the adapter; negative ones subtract.
            mode: `concat` joins the factors, exact, of the ranks' sum; `sum` factorises the sum anew at `rank`.
            rank: for `sum`; the largest of the adapters' unless given.

        Raises:
            ConfigError: for a taken name, adapters that are no plain LoRAs, weights that are no numbers; what was in
                use still is.
        """
        self._check_new(name)
        loras = {other: self[other] for other in weights}
        with self._bare():
            adapter, error = combined(self.model, loras, weights, mode, rank)
            self._start(name, adapter)
        return Combined(adapter, error)

    def remove(self, name: str) -> None:
        """Forget an adapter; the others in use stay in use."""
        self[name]
        self.use(*(other for other in self._using if other != name))
        del self._held[name]

    def save(self, name: str, directory: str | Path) -> None:
        """Write one adapter, in use or not, as it would be written alone."""
        with self.only(name):
            self[name].save(Path(directory))

    def _check_new(self, name: str) -> None:
        if not name or Path(name).name != name or name == "..":
            raise ConfigError(f"{name!r} names no adapter: expected a plain name, which is that of a directory too")
        if name in self._held:
            raise ConfigError(f"an adapter is called {name!r} already: remove it first, or choose another name")

    def _start(self, name: str, adapter: Adapter) -> Adapter:
        self._held[name], self._mounted, self._using = adapter, adapter, (name,)
        self._changed()
        return adapter

    def _originals(self) -> Originals | None:
        """The base before it was quantized, for methods that start from it."""
        return None

    def _changed(self) -> None:
        """Called whenever something else is in use."""

    def _together(self, chosen: Mapping[str, Adapter]) -> Adapter | None:
        """Mount adapters in the bare model."""
        if len(chosen) > 1:
            parts: dict[str, Adapter] = {}
            for name, adapter in chosen.items():
                inner = adapter.members.items() if adapter.members else [("", adapter)]
                parts |= {f"{name}-{label}" if label else name: part for label, part in inner}
            return Stack(StackConfig(parts=[part.config for part in parts.values()]), self.model, parts)
        for adapter in chosen.values():
            adapter.mount()
            return adapter
        return None

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without any adapter; an error puts back what was in use."""
        before = self._mounted
        if before is not None:
            before.unmount()
        try:
            yield
        except BaseException:
            if before is not None:
                before.mount()
            raise
