"""GPTQ checkpoints as bases: what is decoded against the public layout, training, merging, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
import torch
from packed_checkpoints import Integers, Packed
from safetensors.torch import load_file, save_file

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.qa_lora import QALoRAConfig
from finetune.cli import doctor, guarded
from finetune.errors import ConfigError, ModelError
from finetune.kernels import operand
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import Loaded, load
from finetune.quant.affine import AffineLinear, Int4Config
from finetune.quant.affine_ordered import OrderedAffineLinear
from finetune.quant.base import FrozenLinear
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config

Checkpoint = Callable[..., Path]
NAMES = {2: "int2", 3: "int3", 4: "int4", 8: "int8g"}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def settings(bits: int = 4, group_size: int = 32, symmetric: bool = False, version: int = 1, **more: Any) -> Any:
    form = {1: "gptq", 2: "gptq_v2"}[version]
    known = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False, "checkpoint_format": form}
    return {"quant_method": "gptq", **known, **more}


def write(
    dense: Path,
    directory: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    version: int = 1,
    change: Callable[[str, Integers], Integers] = lambda name, weight: weight,
    told: dict[str, Any] | None = None,
    **options: Any,
) -> Packed:
    rng = np.random.default_rng(0)

    def make(name: str, out_features: int, in_features: int) -> Integers:
        return change(name, packing.integers(rng, out_features, in_features, bits, group_size, symmetric))

    told = settings(bits, group_size, symmetric, version) if told is None else told
    return packing.write(dense, directory, make, lambda weight: packing.gptq(weight, version), told or None, **options)


def shuffled(rng: np.random.Generator) -> Callable[[str, Integers], Integers]:
    """Act-order: the inputs of a group lie anywhere."""
    return lambda name, weight: dataclasses.replace(weight, group_I=rng.permutation(weight.group_I))


def read(path: Path, quant: Any = None, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(ModelConfig(path=str(path)), quant or KeepConfig(), dtype, "cpu")


def assert_exact(loaded: Loaded, packed: Packed) -> None:
    for name, weight in packed.weights.items():
        module = loaded.model.get_submodule(name)
        assert isinstance(module, AffineLinear)
        assert np.array_equal(module.dequantize(torch.float32).numpy(), weight.dense_OI()), name


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "version"),
    [
        (2, 64, False, 1),
        (2, -1, True, 2),
        (3, 128, False, 1),
        (3, 32, False, 2),
        (4, 32, False, 1),
        (4, 128, True, 1),
        (4, -1, False, 2),
        (8, 64, False, 1),
        (8, 32, True, 2),
    ],
)
def test_weights_are_those_of_the_layout_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, bits: int, group_size: int, symmetric: bool, version: int
) -> None:
    packed = write(checkpoint(), tmp_path / "q", bits=bits, group_size=group_size, symmetric=symmetric, version=version)
    loaded = read(packed.path)
    assert len(packed.weights) == 14
    assert_exact(loaded, packed)
    assert (loaded.quant.name, loaded.quant.group_size, loaded.quant.symmetric) == (NAMES[bits], group_size, symmetric)
    frozen = loaded.model.get_submodule(Q_PROJ)
    assert not isinstance(frozen, OrderedAffineLinear) and frozen.scale.dtype == torch.float16
    assert (frozen.zero is None) == symmetric
    assert {row.storage for row in storage_table(loaded.model) if row.block and not row.dense} == {NAMES[bits]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_keep_their_bits_in_a_model_of_another_dtype(
    checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    loaded = read(packed.path, dtype=dtype)
    assert_exact(loaded, packed)
    assert loaded.model.get_submodule(Q_PROJ).dequantize(dtype).dtype == dtype
    assert loaded.model.model.norm.weight.dtype == dtype


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (8, False)])
def test_act_order(checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, bits: int, symmetric: bool) -> None:
    told = settings(bits, 32, symmetric, desc_act=True)
    change = shuffled(np.random.default_rng(1))
    packed = write(checkpoint(), tmp_path / "q", bits=bits, symmetric=symmetric, change=change, told=told)
    loaded = read(packed.path)
    assert_exact(loaded, packed)
    linear = loaded.model.get_submodule(Q_PROJ)
    assert isinstance(linear, OrderedAffineLinear)
    dense = torch.from_numpy(packed.weights[Q_PROJ].dense_OI())
    x = torch.randn(3, linear.in_features, requires_grad=True)
    torch.testing.assert_close(linear(x), x @ dense.T)
    (gradient,) = torch.autograd.grad(linear(x).square().sum() / 2, x)
    torch.testing.assert_close(gradient, (x @ dense.T) @ dense)
    stored, gradient = linear.operand(), torch.randn(3, linear.out_features)
    y = operand.linear(x.detach(), None, stored.tensors, stored.spec, linear.out_features)
    torch.testing.assert_close(y, x.detach() @ dense.T)
    back = operand.input_gradient(gradient, stored.tensors, stored.spec, linear.in_features)
    torch.testing.assert_close(back, gradient @ dense)
    same = linear.requantize(linear.dequantize(torch.float32))
    assert torch.equal(same.weight, linear.weight) and torch.equal(same.order, linear.order)
    moved = linear.requantize(dense * 1.01)
    assert (moved.dequantize(torch.float32) - dense * 1.01).norm() < 0.25 * dense.norm()
    assert linear.bytes() * 8 == pytest.approx(linear.bits_per_weight() * dense.numel())
    loaded.model.save_pretrained(tmp_path / "ours")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ours" / name).write_bytes((packed.path / name).read_bytes())
    again = read(tmp_path / "ours")
    assert_exact(again, packed)
    assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    linear.to(torch.bfloat16)
    assert linear.order.dtype == torch.int32 and linear(x.bfloat16()).dtype == torch.bfloat16


def test_an_order_that_is_none_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    change = shuffled(np.random.default_rng(1))
    linear = read(write(checkpoint(), tmp_path / "q", change=change).path).model.get_submodule(Q_PROJ)
    state = linear.packed_state()
    with pytest.raises(ModelError, match=r"a\.weight.order is no order of 128 inputs"):
        linear.take_state(state | {"weight.order": torch.zeros(128, dtype=torch.int32)}, "a.")
    with pytest.raises(ModelError, match=r"a\.weight.order is missing"):
        linear.take_state({key: value for key, value in state.items() if key != "weight.order"}, "a.")


def test_groups_that_nobody_numbered_are_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    tensors = load_file(packed.path / "model.safetensors")
    save_file({k: v * 0 if k.endswith("g_idx") else v for k, v in tensors.items()}, packed.path / "model.safetensors")
    assert_exact(read(packed.path), packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_gptqmodel_took_from_whole_words(checkpoint: Checkpoint, tmp_path: Path, bits: int) -> None:
    """Its v1: one subtraction from each word, which borrows from the neighbour of a zero point of 0."""
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))

    def pack(weight: Integers) -> dict[str, np.ndarray]:
        tensors = packing.gptq(weight, 2)
        return tensors | {"qzeros": (tensors["qzeros"].view(np.uint32) - ones).view(np.int32)}

    rng = np.random.default_rng(0)
    told = settings(bits, meta={"quantizer": ["optimum:1.24.0", "gptqmodel:1.9.0"]})
    packed = packing.write(
        checkpoint(), tmp_path / "q", lambda name, *shape: packing.integers(rng, *shape, bits, 32, False), pack, told
    )
    assert_exact(read(packed.path), packed)


@pytest.mark.parametrize("first", [True, False], ids=["first-versions", "later"])
def test_three_bits_of_gptqmodel(checkpoint: Checkpoint, tmp_path: Path, first: bool) -> None:
    """Its first versions subtracted 4, 2 and 1 in turns from the fields of three words; later ones 1 from each."""
    turns = np.array([0x24924924, 0x92492492, 0x49249249], dtype=np.uint32)

    def pack(weight: Integers) -> dict[str, np.ndarray]:
        if not first:
            return packing.gptq(weight)
        tensors = packing.gptq(weight, 2)
        words = tensors["qzeros"].view(np.uint32)
        return tensors | {"qzeros": (words - np.tile(turns, words.shape[1] // 3)).view(np.int32)}

    rng = np.random.default_rng(0)
    told = settings(3, symmetric=True, meta={"quantizer": "gptqmodel:1.0.0"})
    packed = packing.write(
        checkpoint(), tmp_path / "q", lambda name, *shape: packing.integers(rng, *shape, 3, 32, True), pack, told
    )
    loaded = read(packed.path)
    assert_exact(loaded, packed)
    assert loaded.model.get_submodule(Q_PROJ).zero is None


def test_a_symmetric_checkpoint_with_other_zero_points_keeps_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q", told=settings(symmetric=True))
    loaded = read(packed.path)
    assert_exact(loaded, packed)
    assert loaded.model.get_submodule(Q_PROJ).zero is not None


def test_conv1ds_lie_as_linear_layers_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint("GPT2"), tmp_path / "q", modules=("attn", "mlp"), transposed=True)
    assert len(packed.weights) == 8
    assert_exact(read(packed.path), packed)


def test_biases_of_zeros_that_no_layer_has_are_left_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    file = packed.path / "model.safetensors"
    zeros = {f"{name}.bias": torch.zeros(len(weight.dense_OI())) for name, weight in packed.weights.items()}
    tensors = load_file(file) | zeros
    save_file(tensors, file)
    assert_exact(read(packed.path), packed)
    save_file(tensors | {f"{Q_PROJ}.bias": torch.ones(128)}, file)
    with pytest.raises(ModelError, match=r"do not fit its config\.json: unexpected: .*0\.self_attn\.q_proj\.bias$"):
        read(packed.path)


def test_a_packed_head_is_kept_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q", modules=("lm_head", "mlp"), told=settings(lm_head=True))
    loaded = read(packed.path)
    assert "lm_head" in packed.weights and loaded.quant == Int4Config(group_size=32, head=True)
    assert_exact(loaded, packed)


def test_settings_in_a_file_of_their_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q", told={})
    with pytest.raises(ModelError, match=r"config\.json says nothing of a quantization, but the shards hold"):
        read(packed.path)
    beside = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    (packed.path / "quantize_config.json").write_text(json.dumps(beside), "utf-8")
    assert_exact(read(packed.path), packed)


def test_what_was_left_dense_stays_dense(checkpoint: Checkpoint, tmp_path: Path) -> None:
    told = settings(modules_in_block_to_quantize=[["mlp.up_proj"]])
    packed = write(checkpoint(), tmp_path / "q", told=told, modules=("up_proj",))
    loaded = read(packed.path)
    assert len(packed.weights) == 2
    assert_exact(loaded, packed)
    dense = load_file(packed.path / "model.safetensors")[f"{Q_PROJ}.weight"]
    linear = loaded.model.get_submodule(Q_PROJ)
    assert isinstance(linear, FrozenLinear) and torch.equal(linear.dequantize(torch.float32), dense)
    assert any("of the block weights are not quantized" in note for note in loaded.notes)


def test_rules_that_give_layers_widths_of_their_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def change(name: str, weight: Integers) -> Integers:
        if "down_proj" not in name:
            return weight
        return packing.integers(rng, *weight.codes_IO.T.shape, 8, 64, False)

    told = settings(dynamic={"+:.*down_proj": {"bits": 8, "group_size": 64}})
    packed = write(checkpoint(), tmp_path / "q", told=told, change=change)
    loaded = read(packed.path)
    assert_exact(loaded, packed)
    assert {row.storage for row in storage_table(loaded.model) if row.block and not row.dense} == {"int4", "int8g"}


@pytest.mark.parametrize("act_order", [False, True])
def test_lora_trains_on_it_and_merges(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, act_order: bool
) -> None:
    change = shuffled(np.random.default_rng(1)) if act_order else lambda name, weight: weight
    loaded = read(write(checkpoint(), tmp_path / "q", change=change).path)
    before = loaded.model(ids).logits
    adapter = ADAPTERS.build(LoRAConfig(rank=4), loaded.model)
    assert torch.equal(loaded.model(ids).logits, before)
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = loaded.model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    merged, linear = dict(adapter.merged()), loaded.model.get_submodule(Q_PROJ)
    assert len(merged) == 14
    x = torch.randn(3, 128)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ merged[f"{Q_PROJ}.weight"].T, rtol=1e-4, atol=1e-5)


def test_qa_lora_wants_groups_that_are_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    change = shuffled(np.random.default_rng(1))
    loaded = read(write(checkpoint(), tmp_path / "q", change=change).path)
    with pytest.raises(ConfigError, match=r"adapter=qa_lora needs a base stored in groups, and .* is not"):
        ADAPTERS.build(QALoRAConfig(rank=2), loaded.model)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ([], "quant=keep: as the checkpoint stores it: gptq, read as quant=int4 (group_size=32, symmetric=False,"),
        (["quant=nf4"], "quant=nf4 conflicts with"),
        (["quant=int4", "quant.group_size=64"], "quant.group_size=64 conflicts with"),
    ],
    ids=str,
)
def test_the_command_line_keeps_it_where_nobody_chose_otherwise(
    checkpoint: Checkpoint, tmp_path: Path, choice: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    assert guarded(lambda: doctor([f"model.path={packed.path}", *choice])) == (2 if choice else 0)
    told = capsys.readouterr()
    assert words in (told.err if choice else told.out)


def broken(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != f"{Q_PROJ}.{key}"}


def cut(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return tensors | {f"{Q_PROJ}.{key}": tensors[f"{Q_PROJ}.{key}"][:-1].contiguous()}


def narrowed(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """A weight of fewer inputs that is whole in itself."""
    less = {"qweight": 12, "qzeros": 3, "scales": 3, "g_idx": 96}
    return tensors | {f"{Q_PROJ}.{part}": tensors[f"{Q_PROJ}.{part}"][:count] for part, count in less.items()}


def lopsided(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    group_I = tensors[f"{Q_PROJ}.{key}"].clone()
    group_I[0] = 1
    return tensors | {f"{Q_PROJ}.{key}": group_I}


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (broken, "g_idx", r"q_proj\.g_idx is missing from the checkpoint"),
        (broken, "qzeros", r"q_proj\.qzeros is missing from the checkpoint"),
        (cut, "qweight", r"q_proj\.qweight is \[15, 128\] torch\.int32, expected \[16, 128\] torch\.int32"),
        (cut, "scales", r"q_proj\.scales is \[3, 128\] torch\.float16, expected \[4, 128\]"),
        (narrowed, "", r"q_proj\.weight: the checkpoint has shape \[128, 96\], expected \[128, 128\]"),
        (lopsided, "g_idx", r"q_proj\.g_idx puts its 128 inputs into groups that are not of 32 each"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, key: str, words: str
) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    save_file(change(load_file(packed.path / "model.safetensors"), key), packed.path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as raised:
        read(packed.path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"bits": 5}, "is stored in 5 bits: expected 2, 3, 4, 8"),
        ({"bits": None}, "bits of its quantization is None: expected a whole number"),
        ({"group_size": 24}, r"quant\.group_size is 24: expected a power of two"),
        ({"checkpoint_format": "marlin"}, "is GPTQ in the layout 'marlin', which is not read here: expected gptq or"),
        ({"is_marlin_format": True}, "is GPTQ in the layout 'marlin'"),
        ({"checkpoint_format": None, "format": "gptq_p"}, "is GPTQ in the layout 'gptq_p'"),
        ({"quant_method": "aqlm"}, "is stored as aqlm, which cannot be a base here: expected dense .*gptq, awq"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_read_are_named_before_weights_are(
    checkpoint: Checkpoint, tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    packed = write(checkpoint(), tmp_path / "q", told=settings() | told)
    with pytest.raises(ModelError, match=words) as raised:
        read(packed.path)
    assert "\n" not in str(raised.value)


def test_another_quant_is_refused_and_the_same_is_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    with pytest.raises(ModelError, match=r"quant=nf4 conflicts with .* quant=int4: use quant=keep"):
        read(packed.path, NF4Config())
    assert_exact(read(packed.path, Int4Config(group_size=32)), packed)
