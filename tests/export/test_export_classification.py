"""Classifiers and regressors on disk: every adapter with its head, PEFT both ways, and exports in their own runtime."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_checkpoints as tasks
import torch
from torch import Tensor

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter, AdapterConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Batch, Row, TokenRows
from finetune.evaluation import NormalDivergence
from finetune.export.base import ExportSource
from finetune.export.config import ExportConfig
from finetune.export.export import export
from finetune.model.config import ModelConfig
from finetune.model.load import Loaded, load
from finetune.model.task import Task
from finetune.quant.affine import Int4Config
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.nf4 import NF4Config
from finetune.training.config import OBJECTIVES

CLASSES = Task("classification", ("bad", "good"))
STORAGES = (NF4Config(), DenseConfig(), Int4Config(group_size=32), FP4Config())


def opened(base: Path, task: Task = CLASSES, quant: QuantConfig | None = None, seed: int = 0) -> Loaded:
    torch.manual_seed(seed)
    return load(ModelConfig(path=str(base)), quant or DenseConfig(), torch.float32, "cpu", task)


def rows_of(tokenizer: Any, count: int, seed: int = 0, number: bool = False) -> TokenRows:
    made = []
    for row in tasks.rows(count, seed=seed, pairs=True, number=number):
        encoded = tokenizer(row["text"], row["text_pair"])
        ids = np.array(encoded["input_ids"], np.int32)
        target = np.float32(row["label"]) if number else np.int64(row["label"] == "good")
        types = np.array(encoded["token_type_ids"], np.int8) if "token_type_ids" in encoded else None
        made.append(Row(ids, np.full(len(ids), IGNORE, np.int32), target, types))
    return TokenRows.of(made)


def everything(rows: TokenRows) -> Batch:
    return collate(rows, [[i] for i in range(len(rows))], pad_id=0)


def fit(loaded: Loaded, adapter: Adapter, rows: TokenRows, steps: int) -> list[str]:
    """A few steps on all rows; names of trained tensors that the last one gave no gradient."""
    kind = OBJECTIVES.type_of(loaded.task.kind)
    objective = OBJECTIVES.build(kind(), loaded.model)
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=5e-3)
    starved: list[str] = []
    loaded.model.train()
    for _ in range(steps):
        loss, count = objective.loss_sum(everything(rows))
        (loss / count).backward()
        starved = [name for name, p in adapter.trainable().items() if p.grad is None or not bool(p.grad.any())]
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.eval()
    return starved


@torch.no_grad()
def logits(model: Any, rows: TokenRows) -> Tensor:
    result: Tensor = model(**everything(rows).model_inputs()).logits
    return result


def carried() -> list[tuple[str, str, QuantConfig]]:
    """Every method on an encoder and a decoder, the storages in turn; each where it says that it can be."""
    left_out = {"layers", "stack"}  # of an emulator; of other adapters
    names = [name for name in ADAPTERS.types() if name not in left_out]
    turn = itertools.cycle(STORAGES)
    pairs = itertools.product(names, ("bert", "llama"))
    fixed: dict[str, QuantConfig] = {"pissa": NF4Config(), "loftq": NF4Config(), "qat": DenseConfig()}
    fixed |= dict.fromkeys(("qa_lora", "qat_scales"), Int4Config(group_size=32))
    return [
        (name, family, fixed.get(name, next(turn))) for name, family in pairs if (name, family) != ("bitfit", "llama")
    ]


@pytest.mark.parametrize(("name", "family", "quant"), carried(), ids=lambda value: getattr(value, "name", value))
def test_every_adapter_trains_and_keeps_the_head(name: str, family: str, quant: QuantConfig, tmp_path: Path) -> None:
    base = tasks.plain_base(tmp_path / "base", family)

    def attached(seed: int, **more: Any) -> tuple[Loaded, Adapter]:
        loaded = opened(base, quant=quant, seed=seed)
        kind = ADAPTERS.type_of(name)
        small = {"rank": 4, "prefix_length": 5}  # the base has 64 positions
        known = {key: value for key, value in small.items() if key in kind.__dataclass_fields__}
        config: AdapterConfig = kind(**known, **more)
        config.read_tokenizer(loaded.tokenizer)
        return loaded, attach(loaded.model, config, loaded.originals)

    loaded, adapter = attached(seed=0)
    rows = rows_of(loaded.tokenizer, 6)
    head = "classifier" if family == "bert" else "score"
    assert any(key.startswith(f"{head}.") for key in adapter.trainable())
    assert fit(loaded, adapter, rows, 2) == []
    adapter.save(tmp_path / "saved")
    again, _ = attached(seed=7, path=str(tmp_path / "saved"))  # another new head, which the saved one replaces
    torch.testing.assert_close(logits(again.model, rows), logits(loaded.model, rows), atol=1e-6, rtol=1e-6)


def stock(base: Path, loaded: Loaded) -> Any:
    from transformers import AutoModelForSequenceClassification

    pad = {"pad_token_id": loaded.model.config.pad_token_id}
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **pad).eval()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("config", [LoRAConfig(rank=4, alpha=8), IA3Config()], ids=["lora", "ia3"])
def test_stock_peft_says_the_same(family: str, config: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tasks.plain_base(tmp_path / "base", family)
    loaded = opened(base)
    rows = rows_of(loaded.tokenizer, 6)
    adapter = attach(loaded.model, config)
    fit(loaded, adapter, rows, 3)
    adapter.save(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(stock(base, loaded), str(tmp_path / "saved")).eval()
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    assert float((logits(theirs, rows) - logits(loaded.model, rows)).abs().max()) <= 2e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_of_peft_is_read(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tasks.plain_base(tmp_path / "base", family)
    loaded = opened(base)
    rows = rows_of(loaded.tokenizer, 6)
    torch.manual_seed(3)
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    made = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(stock(base, loaded), made).eval()
    theirs.save_pretrained(str(tmp_path / "saved"))
    attach(loaded.model, LoRAConfig(path=str(tmp_path / "saved")))
    assert float((logits(theirs, rows) - logits(loaded.model, rows)).abs().max()) <= 2e-5


@pytest.mark.parametrize(
    ("family", "method", "fits"), [("bert", "prompt_tuning", True), ("llama", "prompt_tuning", False)]
)
def test_what_peft_does_otherwise_is_said(family: str, method: str, fits: bool, tmp_path: Path) -> None:
    """A row alone is judged alike; in a padded batch PEFT reads the padding, so no such export is offered."""
    from peft import PeftModel

    base = tasks.plain_base(tmp_path / "base", family)
    loaded = opened(base)
    rows = rows_of(loaded.tokenizer, 6)
    adapter = attach(loaded.model, ADAPTERS.type_of(method)(prefix_length=5))
    fit(loaded, adapter, rows, 3)
    adapter.save(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(stock(base, loaded), str(tmp_path / "saved")).eval()
    assert float((logits(theirs, rows[:1]) - logits(loaded.model, rows[:1])).abs().max()) <= 2e-5
    assert (float((logits(theirs, rows) - logits(loaded.model, rows)).abs().max()) <= 2e-5) == fits
    assert adapter.in_peft == fits and ("padding or not" in adapter.peft_obstacle) != fits


def proven(base: Path, task: Task, quant: QuantConfig, formats: list[str], out: Path) -> dict[str, Any]:
    """Fit a little, export, prove."""
    loaded = opened(base, task, quant)
    number = task.kind == "regression"
    adapter = attach(loaded.model, LoRAConfig(rank=8, alpha=16))
    fit(loaded, adapter, rows_of(loaded.tokenizer, 48, number=number), 25)
    source = ExportSource(
        model=loaded.model,
        adapter=adapter,
        tokenizer=loaded.tokenizer,
        base_path=str(base),
        dtype=torch.bfloat16,
        quantization_config=loaded.quantization_config,
        max_shard_bytes=10**9,
        digests=loaded.digests,
        task=task,
        key_mapping=loaded.key_mapping,
    )
    held_out = rows_of(loaded.tokenizer, 24, seed=5, number=number)
    proofs = export(source, out, ExportConfig(formats=formats, min_retained=0.9), held_out, loaded.pad_id)
    return {proof.format: proof for proof in proofs}


def test_an_encoder_of_pairs_is_proven(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tasks.plain_base(tmp_path / "base", "bert")
    proofs = proven(base, CLASSES, NF4Config(), ["safetensors", "bnb-nf4"], tmp_path / "out")
    for proof in proofs.values():
        assert proof.rows == proof.tokens == proof.kl_tokens == 24 and proof.loss_export < proof.loss_base
    assert proofs["safetensors"].passed, proofs["safetensors"].reason
    assert proofs["safetensors"].kl_mean < 1e-3 and proofs["bnb-nf4"].bits_per_weight < 16
    assert proofs["safetensors"].runtime == "transformers (AutoModelForSequenceClassification)"
    assert proofs["safetensors"].loss_trained < proofs["safetensors"].loss_base
    directory = tmp_path / "out" / "safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert model.config.problem_type == "single_label_classification"
    assert AutoTokenizer.from_pretrained(directory)("good", "it is").token_type_ids == [0, 0, 0, 1, 1, 1]


def test_a_decoder_of_numbers_is_proven(tmp_path: Path) -> None:
    """Its embeddings lie under the name of a head that a regressor does not have."""
    from safetensors.torch import load_file, save_file

    base = tasks.plain_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    proofs = proven(base, Task("regression"), NF4Config(), ["peft"], tmp_path / "out")
    proof = proofs["peft"]
    assert proof.passed, proof.reason
    assert proof.top1_agreement is None and proof.kl_mean < 1e-3
    assert proof.loss_trained < proof.loss_base and proof.loss_export < proof.loss_base


def test_the_divergence_of_numbers_has_no_unit() -> None:
    """(a - b)^2 / 2 variance: in grams what it is in kilograms."""
    reference, candidate = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [2.0]])
    plain, scaled = NormalDivergence(variance=0.5), NormalDivergence(variance=0.5e6)
    plain.add(reference, candidate)
    scaled.add(1000 * reference, 1000 * candidate)
    assert plain.kl == pytest.approx([0.25, 0.0]) and scaled.kl == pytest.approx(plain.kl)
