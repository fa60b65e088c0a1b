"""What can be said against a configuration before minutes go into a model."""

from __future__ import annotations

from finetune.config import RunConfig
from finetune.device import check_device
from finetune.errors import ConfigError


def check_early(config: RunConfig) -> None:
    """Everything that can be said against a configuration before a model is loaded.

    Raises:
        UserError: for the first thing that cannot work.
    """
    from finetune.adapters.attach import check_path as check_adapter
    from finetune.data.sources import check_sources
    from finetune.export.formats import chosen
    from finetune.model.load import check_path, context_length

    chosen(config.export.formats)
    check_device(config.device)
    check_path(config.model)
    check_adapter(config.adapter)
    check_sources(config.data)
    if config.data.max_length is not None:
        context = context_length(config.model)
        if config.data.max_length > context:
            raise ConfigError(
                f"data.max_length is {config.data.max_length}, longer than the model's context of {context} tokens"
            )


def check_fit(config: RunConfig) -> None:
    """Whether the adapter fits the model, tried on a model without weights: before minutes go into loading them.

    Raises:
        UserError: for a pattern that matches nothing, a rank above a matrix, one half of a tied pair.
    """
    import torch

    from finetune.adapters.attach import attach
    from finetune.model.load import skeleton

    if config.adapter.path is None:  # a saved adapter decides its own shape; it is checked when it is read
        with torch.device("meta"):
            attach(skeleton(config.model), config.adapter)
