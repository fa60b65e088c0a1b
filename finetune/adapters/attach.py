"""Attach an adapter to a loaded model, freshly or from a saved one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS, Adapter, AdapterConfig, Originals
from finetune.adapters.provenance import read_provenance


def attach(model: nn.Module, config: AdapterConfig, originals: Originals | None = None) -> Adapter:
    """Freeze a model and attach an adapter to it in place; from then on the adapter alone trains.

    A fresh adapter leaves the model's outputs as they are, but for prompts and for what brings a quantized model nearer
    to what it was before (QPiSSA, LoftQ). Its initial values are drawn from torch's global generator in module order,
    so that a seed decides them.

    Args:
        model: a causal language model of transformers, its projections frozen in any storage format, or dense.
        config: the method and its settings; `config.path` names a saved adapter to start from.
        originals: the base before it was quantized, for methods that start from it.

    Raises:
        ConfigError: for settings that do not fit the model.
        ModelError: for a saved adapter that does not fit the model or cannot be read.
    """
    adapter: Adapter = ADAPTERS.build(config, model)
    try:
        if config.path is not None:
            adapter.load(Path(config.path))
        else:
            adapter.initialise(originals)
    except BaseException:
        adapter.unmount()  # what is refused leaves no trace
        raise
    return adapter


def check_path(config: AdapterConfig) -> None:
    """What can be said against `adapter.path` before any model is loaded.

    Raises:
        ModelError: for a directory, settings or weights that are missing, unreadable or too new.
        ConfigError: for settings that contradict the saved adapter's.
    """
    for start in config.starts():
        directory = Path(start.path or "")
        peft_format.read_config(directory)
        peft_format.check_header(directory)
        start.check_saved(directory)
        read_provenance(directory)
