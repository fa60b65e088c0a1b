"""GPTQ checkpoints as AutoGPTQ, GPTQModel and optimum write them: affine integers of 2, 3, 4 or 8 bits.

In place of `weight` (AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py, `pack`): `qweight` (int32 [ceil(I * bits / 32), O],
codes along the input, least significant bits first; 32 codes of 3 bits in three words), `qzeros` (int32 [G, ceil(O *
bits / 32)], zero points packed likewise along the output), `scales` ([G, O] in a floating dtype), `g_idx` (int32 [I],
the group of each input). A weight is `scales * (code - zero)`.

`checkpoint_format` says what `qzeros` holds:

- `gptq` (v1, and where nothing is said): each zero point less one, so that 0 becomes the largest code.
- `gptq_v2`: the zero points.

GPTQModel makes v1 from v2 by subtracting from whole words (utils/model.py, `convert_gptq_v2_to_v1_format_module`),
which borrows from the neighbour where a zero point is 0. Its own files are read by adding the same, which gives the
zero points back exactly. For 3 bits it takes a field at a time like the others; its first versions subtracted constants
in the wrong order, which shows where zero points are known to be symmetric.

A group that is a run of inputs is ours; with act-order (`desc_act`) columns are put in order (quant/affine_ordered.py).

Shape suffixes: O out features, I in features, G groups of a row, W words.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.kernels import affine
from finetune.model.integer_state import (
    FLOATING,
    affine_config,
    affine_state,
    as_bytes,
    column_order,
    complete,
    number,
)
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.affine_storage import AffineConfig
from finetune.quant.base import QuantConfig
from finetune.quant.facts import checked

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"

WORDS: dict[int, tuple[int, ...]] = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
"""What GPTQModel subtracts from the words of `qzeros`, by bits."""
FIRST_WORDS_3 = (0x24924924, -0x6DB6DB6E, 0x49249249)
"""What its first versions did with 3 bits; 0x92492492 as int32."""


class Gptq(StoredFormat):
    """`qweight` beside `g_idx`.

    Attributes:
        told: `quantization_config` of the checkpoint at hand.
    """

    mark = "qweight"
    companions = ("qweight", "qzeros", "scales", "g_idx")
    methods = (METHOD,)
    packs_experts_singly = True

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def of(self, told: dict[str, Any]) -> Self:
        form = copy.copy(self)
        form.told = told
        return form

    def idle(self, held: Held) -> frozenset[str]:
        """Biases of nothing but zeros, which early packages wrote for layers that have none."""
        names = [f"{self.weight_of(mark).removesuffix('weight')}bias" for mark in self.marks(held)]
        return frozenset(name for name in names if name in held and not any(held[name][0].read(held[name][1])))

    def settings(self, told: dict[str, Any], held: Held, where: str) -> AffineConfig:
        form = self._layout()
        if form not in (V1, V2) or told.get("is_marlin_format"):
            form = "marlin" if told.get("is_marlin_format") else form
            raise ModelError(f"{where} is GPTQ in the layout {form!r}, which is not read here: expected {V1} or {V2}")
        symmetric = bool(told.get("sym", True))
        return affine_config(number(told, "bits", where), number(told, "group_size", where), symmetric, where)

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> AffineConfig:
        """Those of the checkpoint, but where a rule of `dynamic` made this weight another; zero points by their values.

        A weight has none where the checkpoint is symmetric and the middle code stands for 0 throughout.
        """
        assert isinstance(quant, AffineConfig)
        path = name.removesuffix("weight")
        complete(stored, self.companions, path)
        width, rows = len(stored["g_idx"]), stored["scales"].shape[-1]
        bits, size = quant.bits, quant.group_size
        if self.told.get("dynamic"):
            bits = stored["qweight"].shape[0] * 32 // max(width, 1)
            members = int((stored["g_idx"] == 0).sum())
            size = members if members < width else -1
        found = affine_config(bits, size, quant.symmetric, f"{path}qweight")
        groups = affine.groups(width, size)
        checked(stored, path, "qweight", (_words(width, bits), rows), torch.int32)
        checked(stored, path, "qzeros", (groups, _words(rows, bits)), torch.int32)
        checked(stored, path, "scales", (groups, rows), *FLOATING)
        checked(stored, path, "g_idx", (width,), torch.int32, torch.int64)
        middle = found.symmetric and bool((self._zeros(stored, bits) == 2 ** (bits - 1)).all())
        return replace(found, symmetric=middle)

    def state(self, stored: dict[str, Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quant, AffineConfig)
        zero_OG = None if quant.symmetric else self._zeros(stored, quant.bits).T
        codes_OP, scale_OG = as_bytes(stored["qweight"].T), stored["scales"].T
        order_I = self._order(stored["g_idx"], name, quant, scale_OG.shape[1])
        return affine_state(codes_OP, scale_OG, zero_OG, quant, len(stored["g_idx"]), dtype, order_I)

    def _layout(self) -> str:
        return str(self.told.get("checkpoint_format") or self.told.get("format") or V1).lower()

    def _order(self, group_I: Tensor, name: str, quant: AffineConfig, groups: int) -> Tensor | None:
        """The order of the columns where groups are no runs of them."""
        if groups > 1 and not group_I.any() and not self.told.get("desc_act"):
            return None  # written by kernels that never look at it
        return column_order(group_I, quant.group_size, f"{name.removesuffix('weight')}g_idx")

    def _zeros(self, stored: dict[str, Tensor], bits: int) -> Tensor:
        """The zero points, uint8 [G, O]."""
        words_GW, rows = stored["qzeros"], stored["scales"].shape[-1]
        if self._layout() == V2:
            return _fields(words_GW, bits, rows)
        theirs = any("gptqmodel" in str(tool) for tool in _listed((self.told.get("meta") or {}).get("quantizer")))
        if theirs and bits in WORDS:
            return _fields(_added(words_GW, WORDS[bits]), bits, rows)
        zeros_GO = (_fields(words_GW, bits, rows) + 1) & (2**bits - 1)
        middle = 2 ** (bits - 1)
        if theirs and bits == 3 and self.told.get("sym") and bool((zeros_GO != middle).any()):
            return _fields(_added(words_GW, FIRST_WORDS_3), bits, rows)
        return zeros_GO


def _fields(words_GW: Tensor, bits: int, rows: int) -> Tensor:
    """Unpacked zero points, uint8 [G, O]."""
    packed_GP = as_bytes(words_GW)[:, : affine.packed_width(rows, bits)]
    return affine.unpack(packed_GP, bits, rows)


def _added(words_GW: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Words with a constant added to each, in turns, modulo 2^32."""
    every_W = torch.tensor(offsets, dtype=torch.int32, device=words_GW.device)
    return words_GW + every_W.repeat(-(-words_GW.shape[1] // len(offsets)))[: words_GW.shape[1]]


def _words(count: int, bits: int) -> int:
    """int32 words that hold so many codes; 3 bits come 32 codes at a time."""
    return -(-count // 32) * 3 if bits == 3 else -(-count * bits // 32)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
