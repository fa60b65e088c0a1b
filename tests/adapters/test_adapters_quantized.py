"""Every family quantized by `finetune quantize`: opened as what it is, calibrated, read back by us and by stock."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters_models import TINY, ids, make, task_of
from adapters_running import sent_alike
from quantize_models import run
from task_checkpoints import OTHERS, tokenizer
from torch import nn

from finetune.model.config import ModelConfig
from finetune.model.held import candidates
from finetune.model.load import load
from finetune.quant.keep import KeepConfig
from finetune.quant.packed import PackedWeight

FORMATS = {
    "nf4": ["quant=nf4"],
    "int4": ["quant=int4", "quant.group_size=32", "calibrator=gptq"],
    "w8a8": ["quant=w8a8", "quant.activations=tensor", "quant.static=true"],
}
WITHIN = {"nf4": 0.75, "int4": 0.5, "w8a8": 0.1}
"""How far logits may be from the dense ones, as a share of their size."""
ALIGNED = {
    "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
"""Widths that bitsandbytes' own blocks of 64 divide."""
NAMED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "glm", "falcon", "bloom", "opt", "gpt2", "gpt_neox",
    "mixtral", "qwen2_moe", "bert", "roberta", "t5",
)  # fmt: skip
IN_BOTH = ("bert", "t5")
"""Families that are calibrated in either way."""
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


def cases() -> list[Any]:
    chosen = [(family, "nf4") for family in NAMED]
    chosen += [(family, ("int4", "w8a8")[number % 2]) for number, family in enumerate(NAMED) if family not in IN_BOTH]
    chosen += [(family, quant) for family in IN_BOTH for quant in ("int4", "w8a8")]
    rest = [(family, quant) for family in TINY for quant in FORMATS if (family, quant) not in chosen]
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]


@functools.cache
def base_of(family: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a family, and rows as its task has them."""
    model = make(family, **{key: value for key, value in ALIGNED.items() if key in TINY[family][2]})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    task, base = task_of(model), folder / family
    model.save_pretrained(base)
    tokenizer(encoder=task in ("MaskedLM", "SequenceClassification")).save_pretrained(base)
    rows = folder / f"{family}.jsonl"
    texts = [" ".join(OTHERS[(number * step) % len(OTHERS)] for step in range(1, 12)) for number in range(1, 21)]
    made = {
        "SequenceClassification": [{"text": text, "label": number % 3} for number, text in enumerate(texts)],
        "Seq2SeqLM": [{"prompt": text, "completion": text[::2]} for text in texts],
    }.get(task, [{"text": text} for text in texts])
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return base, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@torch.no_grad()
def fed(model: Any) -> dict[str, Any]:
    tokens = ids() % 20 + 2
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if task_of(model) == "Seq2SeqLM" else {})


def logits(model: Any) -> torch.Tensor:
    return model(**fed(model)).logits


@pytest.mark.parametrize(("family", "quant"), cases())
def test_a_family_is_quantized_and_read_back(family: str, quant: str, folder: Path, tmp_path: Path) -> None:
    base, rows = base_of(family, folder)
    record = run(base, None if quant == "nf4" else rows, tmp_path / "out", *FORMATS[quant])
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    dense = getattr(transformers, told["architectures"][0]).from_pretrained(base, dtype=torch.float32).eval()
    assert told["architectures"] == json.loads((base / "config.json").read_text("utf-8"))["architectures"]
    layers = record["layers"]
    assert all(layer["error"] <= layer["error_rtn"] * 1.0001 for layer in layers)
    if quant == "int4":
        assert sum(layer["error"] for layer in layers) < 0.9 * sum(layer["error_rtn"] for layer in layers)
    wanted = logits(dense)
    held = candidates(dense.config)[0]
    ours = load(ModelConfig(str(tmp_path / "out"), fused="off"), KeepConfig(), torch.float32, "cpu", held).model
    assert sum(isinstance(module, PackedWeight) for module in ours.modules()) == len(layers)
    here, error = ..., logits(ours) - wanted
    if quant == "w8a8":  # 8 bits move a router too, and a token that another expert reads differs by more than rounding
        here = sent_alike(dense, ours, fed(dense))
        assert here is ... or here.float().mean() >= 0.8
        assert error.norm() < 2 * WITHIN[quant] * wanted.norm()
    assert error[here].norm() < WITHIN[quant] * wanted[here].norm()
    method = told["quantization_config"]["quant_method"]
    if method in PACKAGES and importlib.util.find_spec(PACKAGES[method]):
        stock = type(dense).from_pretrained(tmp_path / "out", dtype=torch.float32, device_map={"": "cpu"}).eval()
        # bitsandbytes decodes in an order of its own, and w8a8's rounding makes steps of what differs in the last bit
        assert (logits(stock) - logits(ours)).norm() < 0.02 * wanted.norm()
