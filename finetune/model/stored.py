"""How a checkpoint is stored already, and what config.json says of a model that is saved as it is in memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.model.affine_format import AffineCodes
from finetune.model.bnb_format import Bnb4bit
from finetune.model.bnb_int8_format import BnbInt8
from finetune.model.compressed_format import METHOD as COMPRESSED
from finetune.model.compressed_format import CompressedTensors
from finetune.model.headers import Header
from finetune.model.stored_format import StoredFormat
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig

FORMATS: tuple[StoredFormat, ...] = (Bnb4bit(), BnbInt8(), AffineCodes(), CompressedTensors())
METHOD = "finetune"
"""`quant_method` of a checkpoint that only we read; stock transformers refuses it by this name."""
FORMAT_VERSION = 1


class Storage:
    """How a checkpoint is stored.

    Attributes:
        format: of its quantized weights.
        settings: of the checkpoint as ours.
        packed: the dtype that a packed weight is disguised as, by its name.
    """

    def __init__(self, form: StoredFormat, settings: QuantConfig, packed: dict[str, torch.dtype]) -> None:
        self.format, self.settings, self.packed = form, settings, packed


def storage_of(config: dict[str, Any], headers: list[Header], where: str) -> Storage | None:
    """How a checkpoint is stored, by its config.json and the headers of its shards; None for a dense one.

    Raises:
        ModelError: for a storage that we do not read.
    """
    told = config.get("quantization_config")
    held = {tensor.name: (header, tensor) for header in headers for tensor in header.tensors}
    found = [form for form in FORMATS if form.marks(held)]
    if told is None and not found:
        return None
    method = (told or {}).get("quant_method", "bitsandbytes")
    if method not in ("bitsandbytes", COMPRESSED, METHOD):
        raise ModelError(
            f"{where} is stored as {method}, which cannot be a base here: expected dense weights, bitsandbytes, "
            f"{COMPRESSED} or {METHOD}"
        )
    version = (told or {}).get("format_version", FORMAT_VERSION)
    if method == METHOD and version != FORMAT_VERSION:
        raise ModelError(f"{where}: config.json has format_version {version}, this program reads {FORMAT_VERSION}")
    if len(found) != 1:
        what = "several kinds of quantized weights" if found else "no quantized weight"
        raise ModelError(f"{where}: config.json says {method}, but the shards hold {what}: save it again")
    form = found[0]
    settings = form.settings(told or {}, held, where)
    weights = {form.weight_of(mark) for mark in form.marks(held)}
    return Storage(form, settings, {name: form.disguise(held[name][1]) for name in weights if name in held})


def quantization_config(
    quant: QuantConfig, dtype: torch.dtype, kept: list[str], *, stacks: bool = False
) -> dict[str, Any] | None:
    """`quantization_config` of config.json for a model stored so; None for a dense one.

    It is in stock transformers' terms where that reads the model, else under our own method.

    Args:
        quant: the storage format.
        dtype: that stock modules compute in.
        kept: names of the linear modules that are not quantized.
        stacks: whether experts are packed too, which no stock library reads.
    """
    if isinstance(quant, DenseConfig):
        return None
    form = next((form for form in FORMATS if form.writes(quant)), None)
    stock = form.stock_config(quant, dtype, kept) if form is not None and not stacks else None
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
