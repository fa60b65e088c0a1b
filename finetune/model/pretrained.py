"""Read configuration, tokenizer and weights through transformers, and say in one line what it cannot do."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from finetune.errors import ModelError, nearest
from finetune.model.check import read_json
from finetune.model.config import ModelConfig
from finetune.model.loading import Loading
from finetune.model.quantizer import FrozenBaseConfig
from finetune.model.stored import METHOD
from finetune.model.streaming import fixed_thresholds, own_memory
from finetune.model.task import CAUSAL_LM, Task
from finetune.model.task_head import settle, shared_elsewhere, start


def read_config(directory: Path, model: ModelConfig) -> Any:
    """The configuration as transformers reads it; Python that comes with the checkpoint only where asked for."""
    raw = read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")
    kind = raw.get("model_type")
    native = kind in CONFIG_MAPPING
    if not native and raw.get("auto_map") and not model.trust_remote_code:
        raise ModelError(
            f"{directory} needs Python that comes with the checkpoint (auto_map in config.json): read it, "
            "then allow it with model.trust_remote_code=true"
        )
    if not native and not raw.get("auto_map"):
        hint = nearest(str(kind), CONFIG_MAPPING)
        raise ModelError(
            f"{directory / 'config.json'} names model_type {kind!r}, which this transformers does not know{hint}"
        )
    with _one_line(f"{directory / 'config.json'} cannot be used"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code, local_files_only=True)


def read_tokenizer(directory: Path, model: ModelConfig) -> Any:
    """The tokenizer of a checkpoint, unchanged."""
    with _one_line(f"the tokenizer in {directory} cannot be used"):
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=model.trust_remote_code, local_files_only=True
        )


def read_model(
    directory: Path,
    config: Any,
    model: ModelConfig,
    loading: Loading,
    device: str,
    task: Task = CAUSAL_LM,
    stored: Collection[str] = (),
) -> Any:
    """The model, frozen while its tensors stream in; a head that the task needs and the checkpoint lacks is made new.

    Experts run in transformers' eager loop: it reads one expert's weight at a time, which frozen stacks can serve.

    Args:
        stored: names of the checkpoint's tensors, by which a task's model finds what only another head names.

    Raises:
        ModelError: where the weights do not fit the configuration, or transformers cannot use either.
    """
    native = native_class(config, model, task, str(directory))
    options: dict[str, Any] = {"attn_implementation": attention_for(native, model, loading)}
    if loading.stored is None:
        options["quantization_config"] = FrozenBaseConfig(loading)
    else:
        config.quantization_config = {"quant_method": METHOD, "loading": loading}
    if task.judges_rows and _shared(config, loading, stored):
        options["key_mapping"] = loading.key_mapping
    # What transformers draws for missing weights is drawn again by `start`, from the same point on every device.
    with fixed_thresholds(), quiet(), torch.random.fork_rng(devices=[]):
        try:
            result: Any = task.auto_class().from_pretrained(
                directory,
                config=config,
                dtype=loading.dtype,
                device_map={"": device},
                experts_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=model.trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            if loading.failure is not None:
                raise loading.failure from None
            raise ModelError(f"{directory} cannot be loaded: {_first_line(error)}") from error
        loaded, report = result
        new: list[str] = []
        if task.judges_rows:
            report, new, left = settle(loaded, report)
            loading.notes += _told(new, left, task)
        if loading.stored is not None:
            report = {**report, "unexpected_keys": set(report["unexpected_keys"]) - loading.stored.idle}
        judge({**report, "mismatched_keys": {*report["mismatched_keys"], *loading.mismatched}}, directory)
        own_memory(loaded, loading.pages)
    loaded.requires_grad_(False)
    start(loaded, new)
    return loaded.eval()


def _shared(config: Any, loading: Loading, stored: Collection[str]) -> dict[str, str]:
    """What is stored under the name of a head that the task does not have; it is noted in `loading`."""
    with quiet():
        loading.key_mapping = shared_elsewhere(config, stored)
    if loading.key_mapping:
        loading.notes.append(
            f"{', '.join(loading.key_mapping.values())} is stored under another head's name: stock transformers"
            f" opens this base for the task only with key_mapping={loading.key_mapping}"
        )
    return loading.key_mapping


def empty_model(config: Any, model: ModelConfig, task: Task = CAUSAL_LM) -> Any:
    """The model of a configuration on the meta device; how a checkpoint stores its weights is left out of account.

    Raises:
        ModelError: where there is no such model for the task.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    native_class(config, model, task, f"model.path={model.path}")
    with torch.device("meta"), quiet(), _one_line("the model cannot be built from its configuration"):
        return task.auto_class().from_config(config, trust_remote_code=model.trust_remote_code)


def native_class(config: Any, model: ModelConfig, task: Task, where: str) -> Any:
    """transformers' own class for a configuration and a task; None where the checkpoint's own Python stands in.

    Raises:
        ModelError: where there is none.
    """
    native = task.auto_class()._model_mapping.get(type(config), None)
    if native is None and not model.trust_remote_code:
        other = {"causal_lm": "seq2seq", "seq2seq": "causal_lm"}.get(task.kind)
        fits = other is not None and Task(other).auto_class()._model_mapping.get(type(config), None) is not None
        hint = f": objective={'seq2seq' if other == 'seq2seq' else 'sft'} trains it" if fits else ""
        raise ModelError(f"{where} holds a {config.model_type} model, which is no {task.words}{hint}")
    return native


def _told(new: list[str], left: list[str], task: Task) -> list[str]:
    """What the user should know of a head made new and of heads left out."""
    notes = []
    if new:
        notes.append(f"{', '.join(new)} of the {task.words} is new, from the seed: the checkpoint has none")
    if left:
        notes.append(f"{', '.join(left)} of the checkpoint is left out: a {task.words} has no use for it")
    return notes


def attention_for(native: Any, model: ModelConfig, loading: Loading) -> str:
    """The attention asked for, or eager (said aloud) where the architecture has no other."""
    if model.attention == "sdpa" and native is not None and not getattr(native, "_supports_sdpa", True):
        loading.notes.append(f"{native.__name__} has no sdpa attention: model.attention=eager is used")
        return "eager"
    return model.attention


def judge(report: dict[str, Any], directory: Path) -> None:
    """Refuse a model whose weights are not exactly those of the checkpoint.

    Raises:
        ModelError: listing the first five keys of each kind.
    """
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(f"{kind}_keys") or ())
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            faults.append(f"{kind}: {', '.join(keys[:5])}{more}")
    if faults:
        raise ModelError(f"the weights in {directory} do not fit its config.json: {'; '.join(faults)}")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what transformers raises for files it cannot use into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        own_code = "it needs Python that comes with it: read it, then allow it with model.trust_remote_code=true"
        raise ModelError(f"{what}: {own_code if 'trust_remote_code' in str(error) else _first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers shows no warnings (what they say is judged here) and no bar where nobody watches."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
