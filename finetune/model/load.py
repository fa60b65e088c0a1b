"""A base as the rest of the house needs it: frozen, quantized while it streamed in, with tokenizer and digests."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.model.check import check_directory, check_path, local_directory, read_json, told_of
from finetune.model.config import ModelConfig
from finetune.model.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from finetune.adapters.base import Originals
    from finetune.model.headers import Header
    from finetune.model.loading import Loading
    from finetune.model.stored import Storage
    from finetune.quant.base import QuantConfig

__all__ = ["Loaded", "Task", "check_path", "context_length", "load", "resolve"]

POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "n_ctx")
"""Under which configurations of transformers state how many positions a model was trained on."""

USUAL_CONTEXT = 2048
DENSE_SHARE = 0.2
"""More of the block weights than this left unquantized is worth a note."""


@dataclass
class Loaded:
    """A base, ready for adapters.

    Attributes:
        model: in evaluation mode, every parameter frozen, every projection a frozen module.
        tokenizer: as the checkpoint has it; where it has no pad token it still has none (see `pad_id`).
        digests: sha256 of "base" (the checkpoint's tensors as stored), "tokenizer", "chat_template" (of null where
            there is none) and "quantization" (the settings in force).
        base_path: directory or hub id, as configured; `embedded` as its directory.
        quantization_config: of config.json, in transformers' terms where stock reads it; None for a dense base.
        notes: what the user should know.
        quant: the storage settings in force.
        task: what it was opened for.
        key_mapping: renamings without which transformers does not find all weights of the base for the task.
        originals: reads the weights again as they were before they were quantized, for methods that start from them
            (finetune.adapters.base.Originals); None where what is stored is all there is.
    """

    model: nn.Module
    tokenizer: Any
    digests: dict[str, str]
    base_path: str
    quantization_config: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    quant: QuantConfig | None = None
    task: Task = CAUSAL_LM
    originals: Originals | None = None
    key_mapping: dict[str, str] = field(default_factory=dict)

    @property
    def storage(self) -> dict[str, Any] | None:
        """The storage settings in force as plain values."""
        return None if self.quant is None else asdict(self.quant)

    @property
    def pad_id(self) -> int:
        """Id to fill batches with: the pad token, else the end of sequence (masks are explicit, it is never learnt)."""
        return _pad_id(self.tokenizer)


def load(model: ModelConfig, quant: QuantConfig, dtype: torch.dtype, device: str, task: Task = CAUSAL_LM) -> Loaded:
    """Load a base for a task and freeze it into a storage format, one tensor at a time.

    Peak memory is the frozen model plus about one shard (model/streaming.py says how). A checkpoint that is quantized
    already keeps its storage; `quant` then has to say the same, or `keep`.

    Args:
        model: which base.
        quant: how to store its projections; the head, embeddings, norms and routers stay in `dtype` unless
            `quant.head`.
        dtype: of what is not quantized, and what projections hand on.
        device: "cpu", "cuda", "cuda:1", ...
        task: what it is opened for; a head that the checkpoint lacks is drawn from torch's global generator.

    Raises:
        ModelError: for anything about the checkpoint that the user can mend.
    """
    from finetune.model import digest, pretrained
    from finetune.model.describe import storage_notes
    from finetune.model.hub import fetch
    from finetune.model.stored import storage_of

    directory = fetch(model)
    headers = check_directory(directory)
    stored = storage_of(told_of(directory), headers, str(directory))
    settings = _settings(quant, stored.settings if stored else None, str(directory))
    config = task.configure(pretrained.read_config(directory, model))
    tokenizer = pretrained.read_tokenizer(directory, model)
    if task.judges_rows:
        _agree_on_padding(config, tokenizer)
    loading = pretrained.Loading(settings, dtype, stored)
    names = {tensor.name for header in headers for tensor in header.tensors}
    if task.judges_rows:
        _check_head(pretrained.empty_model(config, model, task), task, directory, headers)
    with ThreadPoolExecutor(1) as pool:
        base = pool.submit(digest.base_digest, headers)
        loaded = pretrained.read_model(directory, config, model, loading, device, task, names)
        digests = _digests(base.result(), tokenizer, loading.quant)
    quantization_config = loading.told()
    notes = [*loading.notes, *_fuse(loaded, model)]
    if quantization_config is not None:
        notes += storage_notes(loaded, DENSE_SHARE)
    notes += _surplus(loaded, tokenizer)
    local = local_directory(model)
    # Absolute, because the adapter's own files name it and are read from anywhere.
    base_path = model.path if local is None else str(local.resolve())
    loaded.config._name_or_path = base_path  # what PEFT's adapter_config.json will name, not a path in the hub's cache
    originals = _originals(loaded, directory, loading) if stored is None and loading.quant.name != "none" else None
    return Loaded(
        loaded,
        tokenizer,
        digests,
        base_path,
        quantization_config,
        notes,
        loading.quant,
        task,
        originals,
        loading.key_mapping,
    )


def _digests(base: str, tokenizer: Any, quant: QuantConfig) -> dict[str, str]:
    """What an adapter that is trained on this base will be compared by; see adapters/provenance.py."""
    from finetune.model import digest

    return {
        "base": base,
        "tokenizer": digest.tokenizer_digest(tokenizer),
        "chat_template": digest.json_digest(getattr(tokenizer, "chat_template", None)),
        "quantization": digest.json_digest(asdict(quant)),
    }


def _surplus(model: Any, tokenizer: Any) -> list[str]:
    """A line on tokens that have no embedding, where there are some."""
    more = len(tokenizer) - model.get_input_embeddings().weight.shape[0]
    return [f"the tokenizer has {more} tokens more than the embeddings have rows: data must not use them"] * (more > 0)


def _check_head(empty: nn.Module, task: Task, directory: Path, headers: Sequence[Header]) -> None:
    """Refuse a checkpoint with a head for other classes than the task's."""
    from finetune.model.task_head import check_head

    shapes = {tensor.name: tensor.shape for header in headers for tensor in header.tensors}
    check_head(empty, task, shapes, read_json(directory / "config.json", ""), str(directory))


def _pad_id(tokenizer: Any) -> int:
    """The pad token, else the end of sequence, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _agree_on_padding(config: Any, tokenizer: Any) -> None:
    """Let model and tokenizer name one pad token: a decoder's classifier reads the last token that is none."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    config.get_text_config().pad_token_id = _pad_id(tokenizer)


def _fuse(loaded: nn.Module, model: ModelConfig) -> list[str]:
    """Exchange modules for fused ones where that is wanted; what the user should know of it."""
    if model.fused == "off":
        return []
    from finetune.model.exchange import exchange, notes

    return notes(exchange(loaded))


def _originals(loaded: nn.Module, directory: Path, loading: Loading) -> Originals:
    """What reads the weights of the checkpoint again; holds the model no longer than the model itself lives."""
    model = weakref.ref(loaded)

    def read(visit: Callable[[str, torch.Tensor], None]) -> None:
        from finetune.model.originals import read_originals

        alive = model()
        assert alive is not None, "the model that these weights belong to is gone"
        read_originals(alive, directory, loading.dtype, visit)

    return read


def resolve(model: ModelConfig) -> str:
    """What transformers calls the base: its directory where it is on this machine, else the hub id.

    Raises:
        ModelError: where it is neither.
    """
    return str(local_directory(model) or model.path)


def skeleton(model: ModelConfig, task: Task = CAUSAL_LM) -> Any:
    """The model without its weights (on the meta device), from its configuration alone: seconds for any size.

    Raises:
        ModelError: where the configuration cannot be read, transformers has no such model for the task, or the
            checkpoint has a head for other classes.
    """
    from finetune.model import pretrained
    from finetune.model.hub import fetch

    directory = fetch(model, weights=False)
    empty = pretrained.empty_model(task.configure(pretrained.read_config(directory, model)), model, task)
    if task.judges_rows and local_directory(model) is not None:
        _check_head(empty, task, directory, check_directory(directory))
    return empty


def storage(model: ModelConfig) -> Storage | None:
    """How a checkpoint on this machine is stored, by its files; None where it is dense, or not here.

    Raises:
        ModelError: for a storage that we do not read.
    """
    from finetune.model.stored import storage_of

    directory = local_directory(model)
    return None if directory is None else storage_of(told_of(directory), check_directory(directory), str(directory))


def check_storage(model: ModelConfig, quant: QuantConfig) -> None:
    """Refuse settings that a checkpoint stored otherwise cannot honour, before it is loaded.

    Raises:
        ModelError: naming both.
    """
    stored = storage(model)
    _settings(quant, stored.settings if stored else None, f"model.path={model.path}")


def stored_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the checkpoint.

    Raises:
        ModelError: where it cannot be read.
    """
    from finetune.model.hub import fetch

    directory = fetch(model, weights=False)
    return read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")


def context_length(model: ModelConfig) -> int:
    """Positions the model was made for, by its configuration; 2048 where that says nothing.

    Raises:
        ModelError: where the configuration cannot be read.
    """
    raw = stored_config(model)
    said = [part.get(key) for part in (raw.get("text_config") or {}, raw) for key in POSITIONS]
    if not any(said):  # left to the defaults of its class: that takes transformers, and seconds
        from finetune.model.hub import fetch
        from finetune.model.pretrained import read_config

        config = read_config(fetch(model, weights=False), model).get_text_config()
        said = [getattr(config, key, None) for key in POSITIONS]
    return next((value for value in said if isinstance(value, int) and value > 0), USUAL_CONTEXT)


def _settings(quant: QuantConfig, stored: QuantConfig | None, where: str) -> QuantConfig:
    """The storage settings in force: what was asked, or what the checkpoint has where that is asked or agrees."""
    from finetune.errors import ConfigError
    from finetune.model.stored import agree
    from finetune.quant.dense import DenseConfig
    from finetune.quant.keep import KeepConfig

    if isinstance(quant, KeepConfig):
        return stored if stored is not None else DenseConfig()
    if stored is not None:
        agree(quant, stored, where)
    elif quant.needs_inputs:
        raise ConfigError(
            f"quant={quant.name} with quant.static=true has no scales for inputs in {where}: make them with `finetune"
            " quantize` and data.calibration=FILE, or set quant.static=false"
        )
    return quant
