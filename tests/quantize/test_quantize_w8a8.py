"""w8a8, w6a6 and w4a8 checkpoints: static scales from calibration, stock transformers, read back as bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quantize_models
import torch
from quantize_models import WORDS, logits, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune as ft
from finetune.errors import ConfigError, ModelError
from finetune.quant.w8a8 import IntegerExperts, IntegerLinear, W4A8Config, W6A6Config, W8A8Config

Made = Callable[..., tuple[Path, dict[str, Any]]]
STATIC = ["quant.activations=tensor", "quant.static=true"]


def save(directory: Path, family: str = "llama") -> Path:
    sizes = {} if family == "gpt2" else {"intermediate_size": 96, "tie_word_embeddings": family == "llama"}
    return quantize_models.save(directory, family, **sizes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.text(tmp_path_factory.mktemp("text") / "rows.jsonl", rows=12, words=40)


@pytest.fixture(scope="module")
def made(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoints of the base by overrides, each made once and left as it is."""
    known: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}

    def make(*overrides: str) -> tuple[Path, dict[str, Any]]:
        if overrides not in known:
            output = tmp_path_factory.mktemp("made") / "out"
            known[overrides] = output, run(base, text, output, *overrides)
        return known[overrides]

    return make


def integer_layers(model: nn.Module) -> Iterator[tuple[str, IntegerLinear]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, IntegerLinear))


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Of any layer in integers from its namesake when both are given what ours meets, as a share of its output.

    Logits cannot tell: one value beyond a rounding boundary, by the last bit of a sum, moves them by 1e-3.
    """
    worst = [0.0]

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            difference = theirs.get_submodule(name)(inputs[0]) - output
            worst.append(float(difference.norm() / output.norm()))

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in integer_layers(ours)]
    logits(ours)
    for handle in handles:
        handle.remove()
    assert len(worst) == len(handles) + 1
    return max(worst)


def rounding(config: Any, scale: Tensor | None) -> Any:
    """A hook that rounds the input of a dense layer as the paper says, in floating point."""
    most = {8: 127, 6: 31}[config.input_bits]

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if scale is not None:
            return ((x / scale).round().clamp(-most - 1, most) * scale,)
        dynamic = (x.abs().amax(-1, keepdim=True) if config.activations == "token" else x.abs().max()) / most
        return ((x / dynamic).round() * dynamic,)

    return hook


CASES: list[tuple[list[str], Any]] = [
    (["quant=w8a8"], W8A8Config()),
    (["quant=w8a8", "quant.weights=tensor", "quant.activations=tensor"], W8A8Config("w8a8", "tensor", "tensor")),
    (["quant=w8a8", "quant.weights=tensor", *STATIC], W8A8Config("w8a8", "tensor", "tensor", True)),
    (["quant=w8a8", *STATIC, "calibrator=gptq"], W8A8Config("w8a8", "channel", "tensor", True)),
    (["quant=w6a6", *STATIC], W6A6Config("w6a6", "channel", "tensor", True)),
    (["quant=w8a8", "quant.group_size=32"], W8A8Config(group_size=32)),
    (["quant=w4a8", "quant.group_size=32", "calibrator=gptq"], W4A8Config(group_size=32)),
]


@pytest.mark.parametrize(("overrides", "config"), CASES, ids=["-".join(o) for o, _ in CASES])
def test_a_dense_model_that_rounds_in_floats_gives_the_same_logits(
    base: Path, made: Made, overrides: list[str], config: Any
) -> None:
    path, record = made(*overrides)
    assert record["bits_per_weight"] == pytest.approx(8 + (config.group_size > 0), abs=0.6)
    assert record["quality"]["kl_mean"] < (0.05 if config.bits > 4 else 0.5)
    ours, _ = ft.load(str(path), dtype="fp32", device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    layers = dict(integer_layers(ours))
    assert len(layers) == 14 and all(layer.settings() == config for layer in layers.values())
    for name, layer in layers.items():
        linear = dense.get_submodule(name)
        linear.weight.data = layer.dequantize(torch.float32)
        linear.register_forward_pre_hook(rounding(config, layer.input_scale))
    theirs = logits(dense)
    assert largest_difference(ours, dense) < 1e-6
    assert (logits(ours) - theirs).norm() < 5e-3 * theirs.norm()


@pytest.mark.parametrize(("overrides", "config"), CASES, ids=["-".join(o) for o, _ in CASES])
def test_stock_transformers_opens_it(made: Made, overrides: list[str], config: Any) -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    path, record = made(*overrides)
    assert "compressed-tensors" in record["read_by"]
    assert ("vLLM" in record["read_by"]) == (config.name == "w8a8" and config.group_size < 0)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"}).eval()
    theirs = logits(stock)
    ours, _ = ft.load(str(path), dtype="fp32", device="cpu")
    for name, layer in integer_layers(ours):
        assert torch.equal(stock.get_submodule(name).weight, layer.dequantize(torch.float32))
    # Its dynamic scales are max / 127.5, ours max / 127: rounded otherwise, but as finely.
    assert largest_difference(ours, stock) < (1e-6 if config.static else 0.05)
    assert (theirs - logits(ours)).norm() < (5e-3 if config.static else 0.15) * theirs.norm()


def test_the_layout_by_hand(base: Path, made: Made) -> None:
    path, _ = made("quant=w8a8", *STATIC, "calibrator=gptq")
    told = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    assert (told["quant_method"], told["format"], told["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    group = told["config_groups"]["group_0"]
    assert group["weights"] | {"dynamic": False} == group["weights"] and group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "tensor" and group["input_activations"]["dynamic"] is False
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes, scale, static = (tensors[f"{name}.{key}"] for key in ("weight", "weight_scale", "input_scale"))
    assert (codes.dtype, codes.shape, scale.shape, static.shape) == (torch.int8, (64, 96), (64, 1), (1,))
    dense = load_file(base / "model.safetensors")[f"{name}.weight"].float()
    assert ((codes.float() * scale - dense).abs() <= scale * 4).all()  # GPTQ may go further than the nearest


def test_static_scales_are_the_largest_inputs_of_calibration(base: Path, text: Path, made: Made) -> None:
    """Of the first layer, whose inputs no rounding has touched yet."""
    path, _ = made("quant=w8a8", *STATIC, f"data.eval={text}")
    ours, tokenizer = ft.load(str(path), dtype="fp32", device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seen: list[float] = []
    first = dense.model.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda _module, inputs: seen.append(float(inputs[0].abs().max())))
    for line in text.read_text("utf-8").splitlines():
        logits_of = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            dense(input_ids=logits_of)
    scale = float(ours.model.layers[0].self_attn.q_proj.input_scale)
    assert scale == pytest.approx(max(seen) / 127, rel=0.01)  # calibrated in bf16
    attention = ours.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.input_scale, attention.v_proj.input_scale)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gpt2", ["quant=w8a8", *STATIC]), ("mixtral", ["quant=w8a8", *STATIC]), ("mixtral", ["quant=w6a6"])],
    ids=["gpt2-static", "mixtral-static", "mixtral-w6a6"],
)
def test_conv1ds_and_experts_are_ours_alone(tmp_path: Path, text: Path, family: str, overrides: list[str]) -> None:
    base = save(tmp_path / "base", family)
    record = run(base, text, tmp_path / "out", *overrides)
    assert record["read_by"].startswith("finetune alone")
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    stacks = [module for module in model.modules() if isinstance(module, IntegerExperts)]
    assert len(stacks) == (4 if family == "mixtral" else 0) and len(list(integer_layers(model))) == 8
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(model) - logits(stock)).norm() < 0.3 * logits(stock).norm()
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again, _ = ft.load(str(tmp_path / "again"), dtype="fp32", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_how_inputs_share_scales_may_be_chosen_anew_but_nothing_else(made: Made) -> None:
    path = str(made("quant=w8a8")[0])
    model, _ = ft.load(path, W8A8Config(activations="tensor"), dtype="fp32", device="cpu")
    assert all(layer.inputs == "tensor" for _, layer in integer_layers(model))
    for other, words in [
        (W8A8Config(weights="tensor"), "quant.weights=tensor conflicts with .* quant.weights=channel"),
        (W6A6Config(), "quant=w6a6 conflicts with .* quant=w8a8"),
        (W8A8Config(activations="tensor", static=True), "quant.static=True conflicts with"),
    ]:
        with pytest.raises(ModelError, match=words):
            ft.load(path, other, dtype="fp32", device="cpu")


def test_adapters_train_on_a_static_base(made: Made) -> None:
    model, tokenizer = ft.load(str(made("quant=w6a6", *STATIC)[0]), dtype="fp32", device="cpu")
    before = logits(model)
    adapter = ft.attach(model, ft.LoRAConfig(rank=4))
    assert torch.equal(logits(model), before)
    ids = tokenizer(" ".join(WORDS), return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", ["w8a8", "w6a6"])
def test_static_scales_want_text_before_anything_is_loaded(base: Path, tmp_path: Path, name: str) -> None:
    words = f"quant={name} looks at inputs with quant.static=true: set data.calibration=FILE"
    with pytest.raises(ConfigError, match=words):
        run(base, None, tmp_path / "out", f"quant={name}", *STATIC)
    with pytest.raises(
        ConfigError, match=f"quant={name} with quant.static=true has no scales for inputs in {base}: make"
    ):
        ft.load(str(base), ft_config(name), device="cpu")


def ft_config(name: str) -> Any:
    return {"w8a8": W8A8Config, "w6a6": W6A6Config}[name](activations="tensor", static=True)


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"input_activations": None}, "int8 weights and no scheme for inputs"),
    ({"weights": {"strategy": "group"}}, "group_size of its quantization is None: expected a whole number"),
    ({"weights": {"strategy": "block"}}, "quant.weights is block: expected channel or tensor"),
    ({"weights": {"num_bits": 2}}, "weights of 2 bits int, inputs of 8 bits int, not read here"),
    ({"input_activations": {"symmetric": False}}, "not read here: expected int, symmetric"),
]


@pytest.mark.parametrize(("change", "words"), FOREIGN, ids=[words[:20] for _, words in FOREIGN])
def test_other_schemes_are_refused_by_name(made: Made, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    shutil.copytree(made("quant=w8a8")[0], tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    for key, value in change.items():
        group[key] = value if value is None else group[key] | value
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelError, match=words) as raised:
        ft.load(str(tmp_path / "out"), device="cpu")
    assert "\n" not in str(raised.value)


def test_a_checkpoint_as_llm_compressor_writes_it(made: Made, tmp_path: Path) -> None:
    """Its scales are in the model's dtype and its schemes name more keys than ours."""
    shutil.copytree(made("quant=w8a8")[0], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors = {name: t.bfloat16() if name.endswith("weight_scale") else t for name, t in tensors.items()}
    expected, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    more = {"actorder": None, "block_structure": None, "group_size": None, "observer": "minmax", "observer_kwargs": {}}
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {key: value | more for key, value in group.items() if isinstance(value, dict)}
    group |= {"output_activations": None, "format": "int-quantized"}
    path.write_text(json.dumps(config), "utf-8")
    found, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    assert torch.equal(logits(found), logits(expected))
