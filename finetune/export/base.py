"""An export format is one file in `finetune/export/formats/` that writes a directory and says who reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.base import Adapter
from finetune.data.rows import TokenRows
from finetune.model.headers import StoredTensor
from finetune.model.task import CAUSAL_LM, Task


@dataclass(frozen=True)
class ExportSource:
    """Everything a format may draw on.

    Attributes:
        model: the adapted transformers model, in memory.
        adapter: what is attached to it; None exports the base itself.
        tokenizer: a transformers tokenizer whose chat template is the one trained with.
        base_path: directory of the base checkpoint, or its hub id.
        dtype: 16-bit (or 32-bit) dtype of weights that are not quantized.
        quantization_config: how the base is stored, in transformers' terms; None for a dense one.
        max_shard_bytes: largest safetensors file.
        digests: of base, tokenizer, chat template and quantization, for finetune.json beside an adapter; None leaves it
            out.
        storage: the base's storage settings in words, for the same file.
        calibration: training rows that formats which round may look at; None rounds to nearest.
        pad_id: token that fills up short rows.
        task: what the base was opened for.
        key_mapping: renamings without which transformers does not find all weights of the base for that task.
    """

    model: Any
    adapter: Adapter | None
    tokenizer: Any
    base_path: str
    dtype: torch.dtype
    quantization_config: dict[str, Any] | None
    max_shard_bytes: int
    digests: Mapping[str, Any] | None = None
    storage: Mapping[str, Any] | None = None
    calibration: TokenRows | None = None
    pad_id: int = 0
    task: Task = CAUSAL_LM
    key_mapping: Mapping[str, str] = field(default_factory=dict)


def has_own_code(model: Any) -> bool:
    """Whether the model's Python came with its checkpoint, which the user then allowed by model.trust_remote_code.

    transformers puts such classes below its module `transformers_modules`; an `auto_map` in config.json alone says only
    that there is such code, not that it was run.
    """
    return type(model).__module__.partition(".")[0] == "transformers_modules"


@dataclass(frozen=True)
class Written:
    """What a format has written.

    Attributes:
        weights: how many weights (not bytes) the files stand for, tied ones counted once.
        quantized: of the modules that it claims to have quantized: their name in the model -> how many weights.
        base: for "peft": the directory or hub id that the adapter belongs on.
        base_quantization: how that base is to be quantized on loading, in transformers' terms; None leaves it as
            stored.
        decode_base: the adapter's runtime cannot store that base as it was trained on, so the proof puts the adapter on
            the decoded weights instead.
    """

    weights: int
    quantized: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    base_quantization: dict[str, Any] | None = None
    decode_base: bool = False


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: as in `export.formats`.
        runtime: who reads it, in words, e.g. "transformers (AutoModelForCausalLM)".
        loader: which loader of the proof client opens it: "checkpoint" or "peft".
        needs_merge: whether the adapter has to be mergeable.
        advice: what a user does whose export keeps too little of the fine-tuning.
        lossless: nothing is lost but the rounding to 16 bits, so mean KL is gated as well, by `export.max_kl`.
        write: writes a new, empty directory and says what the proof needs to know of it.
        check: looks at the tensors in the files and returns a complaint where they are not what the format promises (an
            export that was asked to be quantized and is not); None checks nothing.
        fault: says why an adapter cannot be written so, in words, or nothing; None is for what the rest says already. A
            format with one is for some methods alone: `export.formats=auto` writes it where there is no fault.
        package: what its runtime imports besides transformers, and has to be installed to prove it; None for nothing.
    """

    name: str
    runtime: str
    loader: str
    needs_merge: bool
    advice: str
    lossless: bool
    write: Callable[[ExportSource, Path], Written]
    check: Callable[[Written, Sequence[StoredTensor]], str | None] | None = None
    fault: Callable[[Adapter], str] | None = None
    package: str | None = None


@dataclass
class Proof:
    """What export.json holds. Losses and KL are in nats a token, KL is from the unmerged model; None was not measured.

    Of a classifier or regressor every row counts as one token: losses are in the unit of its objective, and the KL of
    numbers is that of normal distributions around them with the variance of the labels.

    Attributes:
        format, runtime: what was written, and what opened it.
        bytes: of all files in the directory.
        bits_per_weight: of the weight files, scales and tensors left in 16 bits included.
        kl_mean, kl_p99, top1_agreement: over `kl_tokens` learnt positions, each compared over the whole vocabulary.
        loss_base: the base as it was trained on (quantized where it was), without the adapter.
        loss_trained: with the adapter, unmerged, in memory.
        loss_export: the artefact, in its own runtime.
        loss_error: standard error, over rows, of loss_base - loss_trained.
        rows, tokens: held-out rows and learnt positions that the losses run over.
        retained: (loss_base - loss_export) / (loss_base - loss_trained); None where the improvement is within two of
            its standard errors, and the gate is kl_mean instead.
        passed, reason: the verdict; the reason is empty where it passed.
    """

    format: str
    runtime: str
    bytes: int = 0
    bits_per_weight: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    loss_base: float | None = None
    loss_trained: float | None = None
    loss_export: float | None = None
    loss_error: float | None = None
    rows: int = 0
    tokens: int = 0
    kl_tokens: int = 0
    retained: float | None = None
    passed: bool = False
    reason: str = ""
    format_version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
