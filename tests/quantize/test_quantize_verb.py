"""`finetune quantize`: what is written, who reads it, what is refused and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_models import WORDS, logits, run, save
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError, DataError, ModelError, UserError
from finetune.quant.base import FrozenWeight
from finetune.quant.dense import DenseLinear


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize(
    "overrides",
    [
        ["quant=nf4"],
        ["quant=fp4", "quant.double_quant=false"],
        ["quant=int8", "quant.threshold=0"],
        ["quant=int4", "quant.group_size=32"],
        ["quant=int8g", "quant.group_size=-1"],
        ["quant=int3", "quant.group_size=32"],
        ["quant=int2", "quant.zero_point=real", "calibrator.mse=true"],
    ],
    ids=lambda o: o[0],
)
def test_gptq_checkpoints_are_read_back_whole(
    base: Path, text: Path, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(base, text, tmp_path / "out", "calibrator=gptq", *overrides)
    layers, quality = record["layers"], record["quality"]
    assert len(layers) == 14 and all(layer["error"] < layer["error_rtn"] for layer in layers)
    assert quality["kl_mean"] >= 0 and quality["tokens"] > 0 and record["calibration_tokens"] > 500
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    frozen = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    assert len(frozen) == 14 and not any(isinstance(module, DenseLinear) for module in frozen)
    measured = 8 * sum(m.bytes() for m in frozen) / sum(m.in_features * m.out_features for m in frozen)
    assert measured == pytest.approx(record["bits_per_weight"])
    assert "bits a weight" in capsys.readouterr().out


def test_rounding_to_nearest_needs_no_text_and_is_what_loading_does(base: Path, tmp_path: Path) -> None:
    record = run(base, None, tmp_path / "out", "quant=nf4")
    assert record["quality"] is None and record["calibration_tokens"] == 0
    ours, _ = ft.load(str(tmp_path / "out"), dtype="bf16", device="cpu")
    loaded, _ = ft.load(str(base), ft.NF4Config(), dtype="bf16", device="cpu")
    mine, theirs = ours.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_stock_transformers_reads_what_bitsandbytes_can_hold(
    base: Path, text: Path, tmp_path: Path, quant: str
) -> None:
    run(base, text, tmp_path / "out", "calibrator=gptq", f"quant={quant}")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map={"": "cpu"}).eval()
    assert type(stock.model.layers[0].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    ours, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    assert (logits(stock) - logits(ours)).norm() < (0.02 if quant == "nf4" else 0.1) * logits(ours).norm()


@pytest.mark.parametrize(
    "overrides",
    [
        ["quant=int4", "quant.group_size=32"],
        ["quant=int4", "quant.group_size=64", "quant.symmetric=true"],
        ["quant=int8g", "quant.group_size=-1"],
        ["quant=int8g", "quant.group_size=32", "quant.symmetric=false"],
    ],
    ids=lambda o: "-".join(o[:2]),
)
def test_the_compressed_tensors_package_decodes_the_same_weights(
    base: Path, text: Path, tmp_path: Path, overrides: list[str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    record = run(base, text, tmp_path / "out", "calibrator=gptq", *overrides)
    assert "compressed-tensors" in record["read_by"]
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, device_map={"": "cpu"}).eval()
        theirs = logits(stock)
        ours, _ = ft.load(str(tmp_path / "out"), dtype=name, device="cpu")
        decoded = ours.model.layers[0].mlp.up_proj.dequantize(dtype)
        if "dequantize" in told:  # decoded while loading, in the dtype of the scales
            decoded = ours.model.layers[0].mlp.up_proj.dequantize(torch.bfloat16).to(dtype)
        assert torch.equal(stock.model.layers[0].mlp.up_proj.weight, decoded)
        exact = dtype == torch.float32 and "dequantize" not in told
        assert (theirs - logits(ours)).norm() < (1e-5 if exact else 0.02) * theirs.norm()


def test_compressed_tensors_layout(base: Path, text: Path, tmp_path: Path) -> None:
    """Shapes, dtypes and bits as compressed-tensors 0.20 packs them, written out by hand."""
    run(base, text, tmp_path / "out", "quant=int4", "quant.group_size=32")
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    assert told["quant_method"] == "compressed-tensors" and told["format"] == "pack-quantized"
    weights = told["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"]) == (4, 32, "group")
    assert told["ignore"] == ["lm_head"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    zero = tensors[f"{name}.weight_zero_point"]
    assert (packed.shape, packed.dtype) == ((64, 16), torch.int32) and f"{name}.weight" not in tensors
    assert (scale.shape, scale.dtype) == ((64, 4), torch.bfloat16) and zero.shape == (8, 4)
    assert tensors[f"{name}.weight_shape"].tolist() == [64, 128]
    codes = torch.stack([(packed >> 4 * place) & 15 for place in range(8)], -1).reshape(64, 128)
    zeros = torch.stack([(zero >> 4 * place) & 15 for place in range(8)], 1).reshape(64, 4)
    by_hand = (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    ours, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    assert torch.equal(ours.get_submodule(name).dequantize(torch.float32), by_hand)


@pytest.mark.parametrize(
    ("family", "quant"), [("gpt2", "nf4"), ("gpt2", "int4"), ("mixtral", "nf4"), ("mixtral", "int4")]
)
def test_conv1ds_and_experts(tmp_path: Path, text: Path, family: str, quant: str) -> None:
    base = save(tmp_path / "base", family)
    record = run(base, text, tmp_path / "out", "calibrator=gptq", f"quant={quant}")
    assert all(layer["error"] < layer["error_rtn"] and not layer["unseen"] for layer in record["layers"])
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    for layer in record["layers"]:
        module = model.get_submodule(layer["name"])
        assert isinstance(module, FrozenWeight) and module.bits_per_weight() == pytest.approx(layer["bits_per_weight"])
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(model) - logits(stock)).norm() < 0.5 * logits(stock).norm()


def test_training_goes_on_from_such_a_checkpoint(base: Path, text: Path, tmp_path: Path) -> None:
    run(base, text, tmp_path / "out", "calibrator=gptq", "quant=int4", "quant.group_size=32")
    model, tokenizer = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    before = logits(model)
    adapter = ft.attach(model, ft.LoRAConfig(rank=4))
    assert torch.equal(logits(model), before)
    loss = model(input_ids=torch.arange(40, 72)[None], labels=torch.arange(40, 72)[None], use_cache=False).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable().values()) and tokenizer is not None


def test_a_conflicting_quant_names_both(base: Path, text: Path, tmp_path: Path) -> None:
    run(base, text, tmp_path / "out", "quant=int4", "quant.group_size=32")
    with pytest.raises(ModelError, match=r"quant=nf4 conflicts with .* quant=int4"):
        ft.load(str(tmp_path / "out"), ft.NF4Config(), device="cpu")


REFUSED: list[tuple[list[str], type[UserError], str]] = [
    (["calibrator=gptq"], ConfigError, "calibrator=gptq looks at inputs: set data.calibration=FILE"),
    (["calibrator=gtpq"], ConfigError, "calibrator=gtpq: there is no such choice; have .*gptq.*did you mean 'gptq'"),
    (["calibrator.dampign=1"], ConfigError, "unknown key 'calibrator.dampign'"),
    (["adapter=lora"], ConfigError, "adapter"),
    (["quant=none"], ConfigError, "quant=none stores nothing in fewer bits"),
    (
        ["quant=nf4", "calibrator=gptq", "calibrator.mse=true", "data.calibration=x.txt"],
        ConfigError,
        "quant=nf4 is none",
    ),
    (["data.calibration=nowhere.jsonl"], DataError, "data.calibration.*nowhere.jsonl"),
    (["data.samples=0"], ConfigError, "data.samples is 0"),
    (["output="], ConfigError, "output is not set"),
    (["device=tpu"], ConfigError, "device is 'tpu'"),
]


@pytest.mark.parametrize(("overrides", "kind", "words"), REFUSED, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_what_is_refused_before_anything_is_loaded(
    overrides: list[str], kind: type[UserError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words) as raised:
        quantize([f"output={tmp_path / 'out'}", *overrides])
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "rows.jsonl"),
        (json.dumps({"text": "a b"}) + "\n", "fewer than the 64 weights of a group"),
        (json.dumps({"text": "<pad>" * 200}) + "\n", "nothing but padding"),
        (json.dumps({"text": "中文" * 300}) + "\n", "another vocabulary"),
    ],
    ids=["empty", "short", "padding", "vocabulary"],
)
def test_text_that_cannot_calibrate(base: Path, tmp_path: Path, content: str, words: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = tmp_path / "model"
    shutil.copytree(base, own)
    distinct = dict.fromkeys(["<unk>", "<pad>", "<eos>", "a", "b", *WORDS])
    vocabulary = {word: number for number, word in enumerate(distinct)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(own)
    (own / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "rows.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=words):
        quantize([f"model.path={own}", f"output={tmp_path / 'out'}", "calibrator=gptq", f"data.calibration={path}"])
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_no_output_and_an_older_directory_stands(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.quantize.write as writing

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_config", fail)
        with pytest.raises(OSError, match="no space"):
            run(base, text, tmp_path / "out", "quant=nf4")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]  # the blocks that were done
    run(base, text, tmp_path / "out", "quant=nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        run(base, text, tmp_path / "out", "quant=nf4")


def test_a_quantized_checkpoint_is_not_quantized_again(base: Path, tmp_path: Path) -> None:
    run(base, None, tmp_path / "out", "quant=nf4")
    with pytest.raises(ConfigError, match="stored as bitsandbytes already"):
        run(tmp_path / "out", None, tmp_path / "again", "quant=nf4")


def test_small_shards(base: Path, tmp_path: Path) -> None:
    run(base, None, tmp_path / "out", "quant=int4", "quant.group_size=32", "max_shard_gb=0.0001")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 2
    names = [key for shard in shards for key in safe_open(shard, "pt").keys()]
    assert len(names) == len(set(names))
    ft.load(str(tmp_path / "out"), device="cpu")
