"""What is kept of columns that int8 codes lose: which, how near, through every product, on disk, and when none are."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as theirs
import pytest
import torch
from torch import Tensor

from finetune.adapters.lora_layers import LoRALinear
from finetune.errors import ConfigError, ModelError
from finetune.quant.base import QUANTIZERS
from finetune.quant.int8 import Int8Linear
from finetune.quant.int8_storage import Int8Config
from finetune.quant.rounders.gptq import GPTQ

OUT, IN = 48, 128
SMALL = [7, 64, 127]


def weight(small: list[int] = SMALL, factor: float = 0.01) -> Tensor:
    """A weight with some small columns."""
    w_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / 10
    w_OI[:, small] *= factor
    return w_OI


def filled(w_OI: Tensor, dtype: torch.dtype = torch.float32, **settings: Any) -> Int8Linear:
    module: Any = QUANTIZERS.build(Int8Config(**settings), *w_OI.shape, bias=True, dtype=dtype)
    module.store(w_OI)
    module.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    return module


def outlying(rows: int = 33) -> Tensor:
    """Inputs that are as large where the weights are small."""
    x_BI = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1))
    x_BI[:, SMALL] *= 100
    return x_BI


def test_codes_stay_those_of_bitsandbytes_and_small_columns_are_kept() -> None:
    w_OI = weight()
    module = filled(w_OI)
    codes, absmax, _ = theirs.int8_vectorwise_quant(w_OI.half())
    assert torch.equal(module.weight, codes) and torch.equal(module.SCB, absmax)
    assert module.columns is not None and module.columns.tolist() == SMALL
    error_OI, step_O = (module.dequantize(torch.float32) - w_OI).abs(), absmax / 127
    assert bool((error_OI[:, SMALL] <= step_O[:, None] / 2 * 2**-8).all())
    plain = filled(w_OI, keep_columns=None)
    assert plain.columns is None and torch.equal(plain.weight, module.weight)
    rest = [column for column in range(IN) if column not in SMALL]
    assert torch.equal(plain.dequantize(torch.float32)[:, rest], module.dequantize(torch.float32)[:, rest])
    more = 32 * len(SMALL) / (OUT * IN) + 16 * len(SMALL) / IN
    assert module.bits_per_weight() == pytest.approx(plain.bits_per_weight() + more)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outliers_meet_what_is_kept(dtype: torch.dtype, threshold: float) -> None:
    w_OI, x_BI = weight(), outlying().to(dtype)
    module, plain = (filled(w_OI, dtype, threshold=threshold, keep_columns=share) for share in (0.1, None))
    plain.bias = module.bias
    wanted = x_BI.double() @ w_OI.double().T + module.bias.double()
    error, without = ((m(x_BI).double() - wanted).norm() / wanted.norm() for m in (module, plain))
    assert error < 0.01 < 0.05 < without
    again = LoRALinear(module, rank=4, scaling=1.0, dropout=0.0)(x_BI)  # its operator, whose product is zero
    torch.testing.assert_close(again, module(x_BI), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_gradients_are_those_of_the_decoded_weight() -> None:
    module, grad_BO = filled(weight()), torch.randn(33, OUT)
    wanted = grad_BO.double() @ module.dequantize(torch.float32).double()
    for layer in (module, LoRALinear(module, rank=4, scaling=1.0, dropout=0.0)):
        x_BI = outlying().requires_grad_()
        layer(x_BI).backward(grad_BO)
        assert x_BI.grad is not None
        assert (x_BI.grad.double() - wanted).norm() < 1e-5 * wanted.norm()
        assert (x_BI.grad.double() - wanted)[:, SMALL].norm() < 1e-5 * wanted[:, SMALL].norm()


def test_it_survives_disk_and_a_change_of_dtype() -> None:
    module = filled(weight())
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    assert {"weight.columns", "weight.remainder"} <= state.keys()
    again: Any = QUANTIZERS.build(Int8Config(), OUT, IN, bias=True, device="meta")
    again.load_state_dict(state, assign=True)
    assert torch.equal(again(outlying()), module(outlying()))
    assert module.bfloat16().remainder.dtype == torch.bfloat16 and module.columns.dtype == torch.int32
    same = again.requantize(again.dequantize(torch.float32))
    assert torch.equal(same.dequantize(torch.float32), again.dequantize(torch.float32))
    with pytest.raises(ModelError, match=r"weight\.columns names a column beyond the 128"):
        again.take_state({**state, "weight.columns": torch.tensor([0, 5, 128], dtype=torch.int32)})


def test_rounders_leave_kept_columns_as_they_were() -> None:
    w_OI, x_BI = weight(), outlying(300)
    module = filled(w_OI)
    grid = module.fit(w_OI)
    choice = GPTQ().choose(grid, w_OI.float(), x_BI.T @ x_BI)
    assert choice is not None
    taken: Any = module.like(module.settings())
    taken.take(grid, choice.codes_OI)
    torch.testing.assert_close(taken.dequantize(torch.float32), grid.decode(choice.codes_OI), rtol=0, atol=1e-5)
    assert (taken.dequantize(torch.float32) - w_OI)[:, SMALL].norm() < 1e-2 * w_OI[:, SMALL].norm()


def test_nothing_is_kept_of_what_codes_hold() -> None:
    assert filled(weight(small=[])).columns is None
    assert filled(weight(factor=0.2)).columns is None, "a fifth of the others: the codes lose less than a tenth"
    assert filled(weight(factor=0.0)).columns is None, "zeros are codes"
    assert filled(weight(small=list(range(9)))).columns is None, "too many: the row has too large a weight"
    assert filled(torch.zeros(OUT, IN)).columns is None
    experts: Any = QUANTIZERS.build(Int8Config(), OUT, IN, experts=2)
    experts.store(weight().expand(2, OUT, IN))
    assert experts.columns is None


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"quant\.keep_columns is .*expected a share between 0 and 1, or null"):
        Int8Config(keep_columns=share)
