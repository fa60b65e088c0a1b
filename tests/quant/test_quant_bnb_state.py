"""State dicts against bitsandbytes': keys, bits, both directions, and what is said of a broken one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from finetune.errors import ModelError
from finetune.quant.base import QUANTIZERS
from finetune.quant.bnb_state import bnb_state, from_bnb_state
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.facts import pack_json, unpack_json
from finetune.quant.fp4 import FP4Config
from finetune.quant.nf4 import NF4Config

OUT, IN = 96, 128
CONFIGS = {"nf4": NF4Config, "fp4": FP4Config}


def theirs(codebook: str, double_quant: bool, dtype: torch.dtype, storage: torch.dtype = torch.uint8):  # type: ignore[no-untyped-def]
    """A bitsandbytes module, quantized on the CPU, and the weight it was made from."""
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(
        IN, OUT, compress_statistics=double_quant, quant_type=codebook, quant_storage=storage, compute_dtype=dtype
    )
    w_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.weight.data = w_OI.clone()
    module.bias.data = torch.randn(OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    return module.to("cpu").train(), w_OI


def ours(codebook: str, double_quant: bool = True, dtype: torch.dtype = torch.float32, **options) -> Codebook4Linear:  # type: ignore[no-untyped-def]
    config = CONFIGS[codebook](double_quant=double_quant, **options)
    return QUANTIZERS.build(config, OUT, IN, bias=True, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_state_is_theirs_bit_for_bit(codebook: str, double_quant: bool, dtype: torch.dtype) -> None:
    module, w_OI = theirs(codebook, double_quant, dtype)
    mine = ours(codebook, double_quant, dtype)
    mine.store(w_OI)
    assert mine.bias is not None
    mine.bias.data = module.bias.data
    expected, found = module.state_dict(), mine.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_their_state_loads_whatever_the_storage_dtype(codebook: str, double_quant: bool, storage: torch.dtype) -> None:
    module, w_OI = theirs(codebook, double_quant, torch.float32, storage)
    mine = ours("nf4", not double_quant, block_size=128)
    mine.load_state_dict(load(save(module.state_dict())), strict=True)
    assert mine.weight.dtype == torch.uint8 and mine.double_quant == double_quant and mine.codebook == codebook
    stored = ours(codebook, double_quant)
    stored.store(w_OI)
    assert torch.equal(mine.dequantize(torch.float32), stored.dequantize(torch.float32))
    x = torch.randn(3, IN, requires_grad=True)
    torch.testing.assert_close(mine(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_our_state_loads_there(double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    mine = ours("nf4", double_quant)
    mine.store(torch.randn(OUT, IN))
    state = load(save(bnb_state(mine)))
    weight = state.pop("weight")
    loaded = bnb.nn.Params4bit.from_prequantized(
        data=weight, quantized_stats={k.removeprefix("weight."): v for k, v in state.items()}, device="cpu"
    )
    decoded = bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state)
    assert torch.equal(decoded, mine.dequantize(torch.float32))


def test_json_tensor_is_theirs() -> None:
    utils = pytest.importorskip("bitsandbytes.utils")
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": (3, 4), "nested_offset": 0.0123456789}
    assert torch.equal(pack_json(facts), utils.pack_dict_to_tensor(facts))
    assert unpack_json(pack_json(facts)) == json.loads(json.dumps(facts))


def broken(change: dict[str, Tensor | None] | None = None, **facts: object) -> dict[str, Tensor]:
    """A sound state with some tensors exchanged or removed, and some facts changed."""
    module = ours("nf4")
    module.store(torch.randn(OUT, IN))
    state: dict[str, Tensor | None] = dict(bnb_state(module))
    blob = "weight.quant_state.bitsandbytes__nf4"
    state[blob] = pack_json(unpack_json(state[blob]) | facts)  # type: ignore[arg-type]
    return {key: value for key, value in {**state, **(change or {})}.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (broken({"weight.absmax": None}), r"q_proj\.weight\.absmax is missing"),
        (broken({"weight.quant_map": torch.zeros(16)}), r"weight\.quant_map is not the standard table"),
        (broken({"weight.nested_quant_map": torch.zeros(256)}), r"nested_quant_map is not the standard table"),
        (
            broken({"weight": torch.zeros(7, 1, dtype=torch.uint8)}),
            r"q_proj\.weight has 7 x torch\.uint8, expected 6144",
        ),
        (broken({"weight.absmax": torch.zeros(192)}), r"absmax has 192 x torch\.float32, expected 192 x torch\.uint8"),
        (broken(shape=[128, 96]), r"the checkpoint has shape \[128, 96\], expected \[96, 128\]"),
        (broken(blocksize=48), r"blocksize is 48"),
        (broken(blocksize="64"), r"blocksize is '64'"),
        (broken(quant_type="af4"), r"quant_type 'af4'"),
        (broken(nested_blocksize=64), r"nested_blocksize is 64, expected 256"),
        (broken({"weight.quant_state.bitsandbytes__nf4": None}), r"expected codes and one"),
        (broken({"weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}), r"is not JSON"),
        (broken({"weight.quant_state.bitsandbytes__nf4": pack_json({"a": 1})}), r"does not hold quant_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_state_is_named(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        from_bnb_state(ours("nf4"), state, "q_proj.")
    assert "\n" not in str(error.value)
