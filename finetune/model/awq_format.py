"""AWQ checkpoints as AutoAWQ and GPTQModel write them in the layout `gemm`: affine integers of 4 bits.

In place of `weight` (AutoAWQ, modules/linear/gemm.py, `WQLinear_GEMM.from_linear`): `qweight` (int32 [I, O / 8]) and
`qzeros` (int32 [G, O / 8]), both packed along the output, eight to a word in the order 0, 2, 4, 6, 1, 3, 5, 7 from the
least significant bits on; `scales` ([G, O] in a floating dtype). A weight is `scales * (code - zero)`.

The layouts of other kernels (`gemv`, `gemv_fast`, `marlin`, `llm-awq`) order and pad otherwise and are refused by name.

Shape suffixes: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.kernels import affine
from finetune.model.integer_state import FLOATING, affine_config, affine_state, as_bytes, complete, number
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.affine_storage import AffineConfig
from finetune.quant.base import QuantConfig
from finetune.quant.facts import checked
from finetune.quant.packed import CHUNK

METHOD = "awq"
LAYOUT = "gemm"
BITS, PACKED = 4, 8
"""Bits of a code, and codes of a word."""
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Where output j of eight is, once the low halves of a word's bytes (0, 4, 1, 5) stand before the high ones."""


class Awq(StoredFormat):
    """`qweight` packed along the output."""

    mark = "qweight"
    companions = ("qweight", "qzeros", "scales")
    methods = (METHOD,)
    packs_experts_singly = True

    def settings(self, told: dict[str, Any], held: Held, where: str) -> AffineConfig:
        layout = str(told.get("version") or told.get("format") or LAYOUT).lower()
        layout = "llm-awq" if told.get("backend") == "llm-awq" else layout
        if layout != LAYOUT:
            raise ModelError(
                f"{where} is AWQ in the layout {layout!r}, which is not read here: expected {LAYOUT}; quantize the"
                " dense model again with version=GEMM"
            )
        told = {"bits": told.get("w_bit", BITS), "group_size": told.get("q_group_size")} | told
        bits = number(told, "bits", where)
        if bits != BITS:
            raise ModelError(f"{where} is AWQ in {bits} bits: the layout {LAYOUT} has {BITS}")
        return affine_config(bits, number(told, "group_size", where), not told.get("zero_point", True), where)

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> AffineConfig:
        """Those of the checkpoint, with zero points wherever the middle code does not stand for 0 throughout."""
        assert isinstance(quant, AffineConfig)
        path = name.removesuffix("weight")
        complete(stored, self.companions, path)
        width, rows = len(stored["qweight"]), stored["scales"].shape[-1]
        groups = affine.groups(width, quant.group_size)
        checked(stored, path, "qweight", (width, rows // PACKED), torch.int32)
        checked(stored, path, "qzeros", (groups, rows // PACKED), torch.int32)
        checked(stored, path, "scales", (groups, rows), *FLOATING)
        symmetric = quant.symmetric and bool((_unpacked(stored["qzeros"]) == 2 ** (BITS - 1)).all())
        return replace(quant, symmetric=symmetric)

    def state(self, stored: dict[str, Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quant, AffineConfig)
        width = len(stored["qweight"])
        step = max(1, CHUNK // width // PACKED)
        codes = [affine.pack(_unpacked(part).T, BITS) for part in stored["qweight"].split(step, dim=1)]
        zero_OG = None if quant.symmetric else _unpacked(stored["qzeros"]).T
        return affine_state(torch.cat(codes), stored["scales"].T, zero_OG, quant, width, dtype)


def _unpacked(words: Tensor) -> Tensor:
    """Codes in the order of the outputs, uint8, eight columns a word."""
    pairs = as_bytes(words).unflatten(-1, (-1, 4))
    eight = torch.cat([pairs & 15, pairs >> BITS], dim=-1)  # outputs 0 4 1 5 2 6 3 7
    return eight[..., list(PLACES)].flatten(-2)
