"""From a config's *type* to what builds it, and from a config's `name` to its type.

A method announces itself with a decorator in its own file; a scan of the package finds the file, so a
new method is one new file and one YAML. Installed plug-ins are found by the entry point group
`finetune.plugins`: each entry point names a module that registers itself on import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from finetune.errors import ConfigError, nearest

Config = TypeVar("Config")
Builder = TypeVar("Builder", bound=Callable[..., Any])

PLUGIN_GROUP = "finetune.plugins"


class Registry(Generic[Config]):
    """One kind of thing that a configuration can choose, e.g. quantizers or adapters.

    Args:
        kind: what an entry is called in messages, e.g. "quantizer"; also the Hydra config group.
        package: dotted name of the package whose modules are scanned for entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._builders: dict[type, Callable[..., Any]] = {}
        self._types: dict[str, type[Config]] = {}
        self._scanned = False

    def register(self, config_type: type[Config]) -> Callable[[Builder], Builder]:
        """Decorate the function or class that builds from `config_type`; its `name` default becomes the choice's name.

        Raises:
            ValueError: when the name or the type is taken already.
        """
        name = config_type.__dataclass_fields__["name"].default  # type: ignore[attr-defined]
        if name in self._types or config_type in self._builders:
            raise ValueError(f"{self.kind} {name!r} is registered twice: {self._types.get(name)} and {config_type}")

        def keep(builder: Builder) -> Builder:
            self._types[name] = config_type
            self._builders[config_type] = builder
            return builder

        return keep

    def scan(self) -> None:
        """Import every module of the package and every plug-in once, so that their entries register themselves."""
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        load_plugins()

    def types(self) -> dict[str, type[Config]]:
        """Config types by name, in alphabetical order."""
        self.scan()
        return dict(sorted(self._types.items()))

    def type_of(self, name: str) -> type[Config]:
        """The config type called `name`.

        Raises:
            ConfigError: when there is none, naming the nearest.
        """
        types = self.types()
        if name not in types:
            raise ConfigError(f"no {self.kind} is called {name!r}: have {', '.join(types)}{nearest(name, types)}")
        return types[name]

    def build(self, config: Config, *args: Any, **kwargs: Any) -> Any:
        """Call the builder registered for `type(config)` with the config and the arguments.

        Raises:
            ConfigError: when nothing is registered for that type.
        """
        self.scan()
        builder = self._builders.get(type(config))
        if builder is None:
            raise ConfigError(
                f"nothing builds a {self.kind} from {type(config).__name__}; have {', '.join(self._types)}"
            )
        return builder(config, *args, **kwargs)


_loaded_plugins: set[str] = set()


def load_plugins() -> None:
    """Import every installed plug-in once; one that fails is named in a ConfigError.

    Raises:
        ConfigError: naming the plug-in and its error.
    """
    for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        if entry.value in _loaded_plugins:
            continue
        _loaded_plugins.add(entry.value)
        try:
            importlib.import_module(entry.module)
        except Exception as error:
            raise ConfigError(f"plug-in {entry.name!r} ({entry.value}) cannot be imported: {error}") from error
