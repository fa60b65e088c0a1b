"""What can be said against a configuration before minutes go into a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from finetune.config import RunConfig
from finetune.device import check_device
from finetune.errors import ConfigError

SHORTEST_ROW = 2
"""Tokens of a row that something can be learnt from."""

if TYPE_CHECKING:
    from finetune.adapters.base import Adapter, Learner
    from finetune.export.base import Format
    from finetune.model.task import Task


def check(config: RunConfig) -> None:
    """Everything that can be said against a configuration before the weights of a model are loaded.

    Raises:
        UserError: for the first thing that cannot work.
    """
    check_files(config)
    if config.resume is None and not config.adapter.starts():  # a saved adapter's shape is checked when it is read
        check_fit(config)


def check_files(config: RunConfig) -> None:
    """What names, files and their headers say, without transformers.

    Raises:
        UserError: for the first thing that cannot work.
    """
    from finetune.adapters.attach import check_path as check_adapter
    from finetune.data.sources import check_sources
    from finetune.export.config import AUTO
    from finetune.export.formats import chosen
    from finetune.model.load import check_path, check_storage, context_length
    from finetune.training.run_directory import check_output

    if config.export.formats != AUTO:
        chosen(config.export.formats)
    check_device(config.device)
    if config.output_dir is not None and os.environ.get("RANK", "0") == "0":  # the others follow rank 0 into it
        check_output(config.output_dir)
    headers = check_path(config.model)
    check_storage(config.model, config.quant)
    check_adapter(config.adapter)
    config.adapter.check_base(config.quant)
    if config.adapter.path is None:
        config.adapter.check_stored({t.name: t.shape for header in headers for t in header.tensors})
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
        UserError: for a pattern that matches nothing, a rank above a matrix, one half of a tied pair, an export that
            the method cannot be written as.
    """
    import torch

    from finetune.adapters.attach import attach
    from finetune.model.load import skeleton
    from finetune.model.task_head import refuse_bidirectional

    task = task_of(config)
    model = skeleton(config.model, task)
    if task.kind == "causal_lm":
        refuse_bidirectional(model, f"model.path={config.model.path}")
    with torch.device("meta"):
        adapter = attach(model, config.adapter)
    check_exports(config.export.formats, adapter)
    check_training(config, adapter)


def check_training(config: RunConfig, adapter: Learner) -> int:
    """Whether an adapter can train as it is asked to, and how many tokens of a row the model then has positions for.

    Raises:
        ConfigError: where the method says that it cannot, or the rows leave no room for its virtual tokens.
    """
    from finetune.model.load import context_length

    obstacle = adapter.training_obstacle(
        gradient_checkpointing=config.train.gradient_checkpointing, packing=config.data.packing
    )
    if obstacle:
        raise ConfigError(obstacle)
    context, virtual = context_length(config.model), adapter.virtual_tokens
    shortest = config.data.max_length or SHORTEST_ROW
    if virtual and shortest + virtual > context:
        asked = "data.max_length is" if config.data.max_length else "a row has at least"
        room = context - virtual
        fits = f"rows of {room} tokens" if room >= SHORTEST_ROW else f"at most {context - SHORTEST_ROW} virtual tokens"
        raise ConfigError(
            f"{asked} {shortest} and adapter={config.adapter.name} puts {virtual} virtual tokens before every row, more"
            f" than the model's context of {context} tokens: expected {fits}"
        )
    return context - virtual


def task_of(config: RunConfig) -> Task:
    """What the base is opened for; the labels of all rows are read for it, where it judges rows.

    Raises:
        UserError: where labels or the checkpoint's configuration cannot be read, or labels cannot be learnt.
    """
    from finetune.data.label_scan import check_targets, find_classes
    from finetune.data.labels import Labelling
    from finetune.model.load import stored_config
    from finetune.model.task import Task, named_classes

    kind = config.objective.task
    names: tuple[str, ...] = ()
    if kind == "classification":
        names = named_classes(find_classes(config.data), stored_config(config.model))
    task = Task(kind, names)
    if task.judges_rows:
        check_targets(config.data, Labelling(names))
    return task


def check_exports(names: str | Sequence[str], adapter: Adapter | None) -> None:
    """Whether every format that was asked for can be written of an adapter, or the base; `auto` asks for what can.

    Raises:
        ConfigError: for the first that cannot, with those that can.
    """
    from finetune.export.config import AUTO
    from finetune.export.formats import chosen, formats

    for form in chosen([] if names == AUTO else names):
        if reason := export_fault(form, adapter):
            able = ", ".join(name for name, other in formats().items() if not export_fault(other, adapter))
            method = f"adapter={adapter.config.name}" if adapter is not None else "the base"
            kept = "the run keeps the adapter itself in adapter/"
            raise ConfigError(
                f"export.formats: {form.name} cannot be written of {method}: {reason};"
                f" set export.formats=[{able}] ({kept}), or export.formats=auto"
            )


def export_formats(names: str | Sequence[str], adapter: Adapter | None) -> tuple[list[str], str]:
    """The formats to write of an adapter, and a line on those that `auto` leaves out, with the reason; empty for none.

    Raises:
        ConfigError: as `check_exports`.
    """
    from finetune.export.config import AUTO
    from finetune.export.formats import AUTOMATIC, chosen, formats

    check_exports(names, adapter)
    if names != AUTO:
        return list(names), ""
    left_out: dict[str, list[str]] = {}
    for form in chosen(AUTOMATIC):
        left_out.setdefault(export_fault(form, adapter), []).append(form.name)
    for name, form in formats().items():
        if adapter is not None and form.fault is not None and not form.fault(adapter):
            left_out.setdefault(export_fault(form, adapter), []).append(name)
    able = left_out.pop("", [])
    reasons = "; ".join(f"{', '.join(forms)}: {reason}" for reason, forms in left_out.items())
    return able, f"export.formats=auto leaves out {reasons}" if reasons else ""


def export_fault(form: Format, adapter: Adapter | None) -> str:
    """Why a format cannot be written of an adapter, or the base alone; empty where it can."""
    if adapter is None:
        return "there is no adapter" if form.loader == "peft" or form.fault is not None else ""
    if form.needs_merge and not adapter.mergeable:
        return f"it cannot be merged, because {adapter.obstacle}"
    if form.loader == "peft" and adapter.members:
        return "PEFT opens one adapter at a time; adapter/ has a directory for each part"
    if form.fault is not None and (fault := form.fault(adapter)):
        return fault
    if form.package is not None and find_spec(form.package) is None:
        return f"{form.package} is not installed, which opens it: pip install 'finetune-kit[export]'"
    return adapter.peft_obstacle if form.loader == "peft" else ""
