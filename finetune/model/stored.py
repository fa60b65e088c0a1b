"""How a checkpoint is stored already, and what config.json says of a model that is saved as it is in memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.model.affine_format import AffineCodes
from finetune.model.awq_format import Awq
from finetune.model.bnb_format import Bnb4bit
from finetune.model.bnb_int8_format import BnbInt8
from finetune.model.compressed_format import CompressedTensors
from finetune.model.ggml_format import GgmlBlocks
from finetune.model.gptq_format import Gptq
from finetune.model.headers import Header
from finetune.model.int_quantized_format import IntQuantized
from finetune.model.sparse_format import SparseValues
from finetune.model.stored_format import StoredFormat
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig

FORMATS: tuple[StoredFormat, ...] = (
    Bnb4bit(),
    BnbInt8(),
    AffineCodes(),
    GgmlBlocks(),
    SparseValues(),
    CompressedTensors(),
    IntQuantized(),
    Gptq(),
    Awq(),
)
METHOD = "finetune"
"""`quant_method` of a checkpoint that only we read; stock transformers refuses it by this name."""
FORMAT_VERSION = 1


class Storage:
    """How a checkpoint is stored.

    Attributes:
        format: of its quantized weights.
        settings: of the checkpoint as ours.
        packed: the dtype that a packed weight is disguised as, by its name.
        method: `quant_method` of the checkpoint.
        idle: names of its tensors that a model need not have a place for.
    """

    def __init__(
        self,
        form: StoredFormat,
        settings: QuantConfig,
        packed: dict[str, torch.dtype],
        method: str = METHOD,
        idle: frozenset[str] = frozenset(),
    ) -> None:
        self.format, self.settings, self.packed, self.method, self.idle = form, settings, packed, method, idle

    def __str__(self) -> str:
        """In words: the method, and the settings that it comes to."""
        said = [f"{key}={value}" for key, value in asdict(self.settings).items() if key not in ("name", "head")]
        return f"{self.method}, read as quant={self.settings.name} ({', '.join(said)})"


def storage_of(told: dict[str, Any] | None, headers: list[Header], where: str) -> Storage | None:
    """How a checkpoint is stored, by what it says and by the headers of its shards; None for a dense one.

    Args:
        told: from `check.told_of`.
        where: the checkpoint, for messages.

    Raises:
        ModelError: for a storage that we do not read.
    """
    held = {tensor.name: (header, tensor) for header in headers for tensor in header.tensors}
    marked = [form for form in FORMATS if form.marks(held)]
    if told is None and not marked:
        return None
    method = (told or {}).get("quant_method", "bitsandbytes")
    known = list(dict.fromkeys(method for form in FORMATS for method in form.methods))
    if method not in known:
        raise ModelError(
            f"{where} is stored as {method}, which cannot be a base here: expected dense weights, {', '.join(known)}"
        )
    version = (told or {}).get("format_version", FORMAT_VERSION)
    if method == METHOD and version != FORMAT_VERSION:
        raise ModelError(f"{where}: config.json has format_version {version}, this program reads {FORMAT_VERSION}")
    found = [form for form in marked if told is None or method in form.methods]
    if len(found) != 1:
        what = "several kinds of quantized weights" if marked else "no quantized weight"
        says = "nothing of a quantization" if told is None else method
        raise ModelError(f"{where}: config.json says {says}, but the shards hold {what}: save it again")
    form = found[0].of(told or {})
    settings = form.settings(told or {}, held, where)
    weights = {form.weight_of(mark) for mark in form.marks(held)}
    return Storage(
        form,
        settings,
        {name: form.disguise(held[name][1]) for name in weights if name in held},
        method,
        form.idle(held),
    )


def quantization_config(
    quant: QuantConfig,
    dtype: torch.dtype,
    kept: list[str],
    *,
    stacks: bool = False,
    conv1ds: bool = False,
    derived: bool = False,
) -> dict[str, Any] | None:
    """`quantization_config` of config.json for a model stored so; None for a dense one.

    It is in stock transformers' terms where that reads the model, else under our own method.

    Args:
        quant: the storage format.
        dtype: that stock modules compute in.
        kept: names of the linear modules that are not quantized.
        stacks: whether experts are packed too, which no stock library reads.
        conv1ds: whether Conv1Ds are, which some do.
        derived: whether layers of classes derived from `nn.Linear` are, which some do.
    """
    if isinstance(quant, DenseConfig):
        return None
    form = next((form for form in FORMATS if form.writes(quant)), None)
    readable = form is not None and not stacks and form.conv1ds >= conv1ds and form.derived >= derived
    stock = form.stock_config(quant, dtype, kept) if form is not None and readable else None
    return stock or {"quant_method": METHOD, "format_version": FORMAT_VERSION, "quant": asdict(quant)}


def agree(asked: QuantConfig, stored: QuantConfig, where: str) -> None:
    """Refuse settings that a checkpoint stored otherwise cannot honour. Whether its head is packed shows later.

    Raises:
        ModelError: naming both.
    """
    wanted, has = asdict(asked), asdict(stored)
    free = {"head", *asked.at_will}
    for key in sorted((wanted.keys() | has.keys()) - free, key=lambda key: (key != "name", key)):
        if wanted.get(key) != has.get(key):
            name = "quant" if key == "name" else f"quant.{key}"
            raise ModelError(
                f"{name}={wanted.get(key)} conflicts with {where}, which is stored with {name}={has.get(key)}: "
                "use quant=keep, or a dense checkpoint"
            )
