"""A base as the rest of the house needs it: frozen, quantized while it streamed in, with tokenizer and digests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError, nearest
from finetune.model.check import check_directory, check_path, read_json
from finetune.model.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from finetune.quant.base import QuantConfig

__all__ = ["Loaded", "check_path", "context_length", "load"]

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
        quantization_config: in transformers' terms; None for a dense base.
        notes: what the user should know.
        quant: the storage settings in force.
    """

    model: nn.Module
    tokenizer: Any
    digests: dict[str, str]
    base_path: str
    quantization_config: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    quant: QuantConfig | None = None

    @property
    def pad_id(self) -> int:
        """Id to fill batches with: the pad token, else the end of sequence (masks are explicit, it is never learnt)."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def load(model: ModelConfig, quant: QuantConfig, dtype: torch.dtype, device: str) -> Loaded:
    """Load a causal language model and freeze it into a storage format, one tensor at a time.

    Peak memory is the frozen model plus about one shard (model/streaming.py says how). A checkpoint that is quantized
    already keeps its storage; `quant` then has to say the same, or `keep`.

    Args:
        model: which base.
        quant: how to store its projections; the head, embeddings, norms and routers stay in `dtype` unless
            `quant.head`.
        dtype: of what is not quantized, and what projections hand on.
        device: "cpu", "cuda", "cuda:1", ...

    Raises:
        ModelError: for anything about the checkpoint that the user can mend.
    """
    from finetune.model import bnb_format, digest
    from finetune.model.describe import storage_notes
    from finetune.model.hub import fetch

    directory = fetch(model)
    headers = check_directory(directory)
    stored, packed = bnb_format.stored_settings(read_json(directory / "config.json", ""), headers, str(directory))
    settings = _settings(quant, stored, str(directory))
    config = _config(directory, model)
    tokenizer = _tokenizer(directory, model)
    with ThreadPoolExecutor(1) as pool:
        base = pool.submit(digest.base_digest, headers)
        loaded, quantization_config = _weights(
            directory, config, model, settings, packed if stored else None, dtype, device
        )
        digests = {
            "base": base.result(),
            "tokenizer": digest.tokenizer_digest(tokenizer),
            "chat_template": digest.json_digest(getattr(tokenizer, "chat_template", None)),
            "quantization": digest.json_digest(asdict(settings)),
        }
    notes = storage_notes(loaded, DENSE_SHARE) if quantization_config is not None else []
    rows = loaded.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        surplus = len(tokenizer) - rows
        notes.append(f"the tokenizer has {surplus} tokens more than the embeddings have rows: data must not use them")
    base_path = str(directory) if model.path == "embedded" else model.path
    return Loaded(loaded, tokenizer, digests, base_path, quantization_config, notes, settings)


def context_length(model: ModelConfig) -> int:
    """Positions the model was made for, by its configuration; 2048 where that says nothing.

    Raises:
        ModelError: where the configuration cannot be read.
    """
    from finetune.model.hub import fetch

    config = _config(fetch(model, weights=False), model).get_text_config()
    for key in POSITIONS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return USUAL_CONTEXT


def _settings(quant: QuantConfig, stored: QuantConfig | None, where: str) -> QuantConfig:
    """The storage settings in force: what was asked, or what the checkpoint has where that is asked or agrees."""
    from finetune.model.bnb_format import agree
    from finetune.quant.dense import DenseConfig
    from finetune.quant.keep import KeepConfig

    if isinstance(quant, KeepConfig):
        return stored if stored is not None else DenseConfig()
    if stored is not None:
        agree(quant, stored, where)
    return quant


def _config(directory: Path, model: ModelConfig) -> Any:
    """The configuration as transformers reads it; Python that comes with the checkpoint only where asked for."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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


def _tokenizer(directory: Path, model: ModelConfig) -> Any:
    """The tokenizer of a checkpoint, unchanged."""
    from transformers import AutoTokenizer

    with _one_line(f"the tokenizer in {directory} cannot be used"):
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=model.trust_remote_code, local_files_only=True
        )


def _weights(
    directory: Path,
    config: Any,
    model: ModelConfig,
    quant: QuantConfig,
    packed: dict[str, torch.dtype] | None,
    dtype: torch.dtype,
    device: str,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The frozen model, and its storage in transformers' terms.

    Eager experts: the loop that reads one expert's weight at a time is the one that frozen stacks can serve.
    """
    from transformers import AutoModelForCausalLM

    from finetune.model import bnb_format
    from finetune.model.quantizer import METHOD, FrozenBaseConfig, Loading
    from finetune.model.streaming import fixed_thresholds, own_memory

    if type(config) not in AutoModelForCausalLM._model_mapping and not model.trust_remote_code:
        raise ModelError(f"{directory} holds a {config.model_type} model, which is no causal language model")
    loading = Loading(quant, dtype, packed)
    options: dict[str, Any] = {}
    if packed is None:
        options["quantization_config"] = FrozenBaseConfig(loading)
    else:
        config.quantization_config = {"quant_method": METHOD, "loading": loading}
    with fixed_thresholds(), _quiet():
        try:
            result: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=model.attention,
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
        _judge(report, directory)
        own_memory(loaded, loading.pages)
    loaded.requires_grad_(False)
    return loaded.eval(), bnb_format.quantization_config(quant, dtype, loading.kept)


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
        raise ModelError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it transformers shows no warnings (what they say is judged here) and no bar where nobody watches."""
    from transformers.utils import logging

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
