"""Read configuration, tokenizer and weights through transformers, and say in one line what it cannot do."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from finetune.errors import ModelError, nearest
from finetune.model.check import read_json
from finetune.model.config import ModelConfig
from finetune.model.loading import Loading
from finetune.model.quantizer import FrozenBaseConfig
from finetune.model.stored import METHOD
from finetune.model.streaming import fixed_thresholds, own_memory


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


def read_model(directory: Path, config: Any, model: ModelConfig, loading: Loading, device: str) -> Any:
    """The model, frozen while its tensors stream in.

    Experts run in transformers' eager loop: it reads one expert's weight at a time, which frozen stacks can serve.

    Raises:
        ModelError: where the weights do not fit the configuration, or transformers cannot use either.
    """
    native = AutoModelForCausalLM._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
    if native is None and not model.trust_remote_code:
        raise ModelError(f"{directory} holds a {config.model_type} model, which is no causal language model")
    options: dict[str, Any] = {"attn_implementation": _attention(native, model, loading)}
    if loading.stored is None:
        options["quantization_config"] = FrozenBaseConfig(loading)
    else:
        config.quantization_config = {"quant_method": METHOD, "loading": loading}
    with fixed_thresholds(), _quiet():
        try:
            result: Any = AutoModelForCausalLM.from_pretrained(
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
        _judge({**report, "mismatched_keys": {*report["mismatched_keys"], *loading.mismatched}}, directory)
        own_memory(loaded, loading.pages)
    loaded.requires_grad_(False)
    return loaded.eval()


def empty_model(config: Any, model: ModelConfig) -> Any:
    """The model of a configuration on the meta device; how a checkpoint stores its weights is left out of account."""
    import torch

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), _one_line("the model cannot be built from its configuration"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def _attention(native: Any, model: ModelConfig, loading: Loading) -> str:
    """The attention asked for, or eager (said aloud) where the architecture has no other."""
    if model.attention == "sdpa" and native is not None and not getattr(native, "_supports_sdpa", True):
        loading.notes.append(f"{native.__name__} has no sdpa attention: model.attention=eager is used")
        return "eager"
    return model.attention


def _judge(report: dict[str, Any], directory: Path) -> None:
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
def _quiet() -> Iterator[None]:
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
