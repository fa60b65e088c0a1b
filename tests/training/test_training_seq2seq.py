"""objective=seq2seq: the own loss of the model, exact sums over batches, a toy task learnt, exports proven."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import finetune.assets
from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.errors import ConfigError, ModelError
from finetune.training.config import OBJECTIVES
from finetune.training.objectives.seq2seq import Seq2SeqConfig

ROOT = Path(__file__).parents[2]
TINY = Path(finetune.assets.__file__).parent / "tiny"
EOS, PAD, VOCABULARY = 1, 0, 24


def config(kind: str, vocabulary: int = VOCABULARY, eos: int = EOS, pad: int = PAD) -> transformers.PretrainedConfig:
    common = {"vocab_size": vocabulary, "d_model": 64, "eos_token_id": eos, "pad_token_id": pad,
              "decoder_start_token_id": pad}  # fmt: skip
    if kind == "t5":
        return transformers.T5Config(**common, d_kv=16, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0)
    halves = {f"{half}_{key}": value for half in ("encoder", "decoder")
              for key, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
    return transformers.BartConfig(**common, **halves, max_position_embeddings=64, dropout=0.0, bos_token_id=2)


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(config(kind)).eval()


def rows(count: int = 32) -> TokenRows:
    """Copy what was read: four tokens and the end."""
    draws = np.random.default_rng(0).integers(3, VOCABULARY, (count, 4))
    made = []
    for number, draw in enumerate(draws):
        source = [*draw[: 2 + number % 3], EOS]
        ids = np.array([*source, *source], np.int32)
        made.append(Row(ids, np.where(np.arange(len(ids)) < len(source), IGNORE, ids), source=len(source)))
    return TokenRows.of(made)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_the_models_own_and_adds_up(kind: str) -> None:
    model = make(kind)
    objective = OBJECTIVES.build(Seq2SeqConfig(), model)
    data = rows(6)
    batch = collate(data, [[i] for i in range(6)], PAD)
    loss, count = objective.loss_sum(batch)
    own = model(**batch.model_inputs()).loss
    assert count == batch.target_tokens() == sum(len(r.labels) - r.source for r in data)
    assert (loss / count).item() == pytest.approx(own.item(), rel=1e-5)
    parts = [objective.loss_sum(collate(data, [[i]], PAD)) for i in range(6)]
    assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(number for _, number in parts) == count


def test_rows_of_one_text_are_refused() -> None:
    one = TokenRows.of([Row(np.array([3, 4], np.int32), np.array([3, 4], np.int32))])
    with pytest.raises(ConfigError, match="the rows have no side to read"):
        OBJECTIVES.build(Seq2SeqConfig(), make("t5")).loss_sum(collate(one, [[0]], PAD))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_adapter_learns_to_copy_and_peft_reads_it(kind: str, tmp_path: Path) -> None:
    model, data = make(kind), rows()
    adapter = attach(model, LoRAConfig(rank=4, train_also=["lm_head", "embed_tokens", "shared"]))
    objective = OBJECTIVES.build(Seq2SeqConfig(), model)
    batch = collate(data, [[i] for i in range(len(data))], PAD)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss, count = objective.loss_sum(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count)
    assert losses[-1] < 0.75 * losses[0], losses
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(make(kind), str(tmp_path)).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    with torch.no_grad():
        mine, others = (each(**batch.model_inputs()).logits for each in (model, theirs))
    assert (mine - others).abs().max() <= 2e-5


def test_a_run_from_the_command_line_is_proven(tmp_path: Path) -> None:
    """Data, preflight, training on a 4-bit base, samples, and both exports opened by stock libraries."""
    base = tmp_path / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    settings = config("t5", len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    transformers.AutoModelForSeq2SeqLM.from_config(settings).save_pretrained(base)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, base)
    words = ["red", "blue", "green", "black"]
    pairs = [{"prompt": f"copy {a} {b}", "completion": f"{a} {b}"} for a in words for b in words for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [
        f"model.path={base}", "objective=seq2seq", f"data.train={tmp_path / 'rows.jsonl'}", "quant=nf4",
        "adapter.rank=4", "train.max_steps=6", "train.grad_accumulation=1", "train.batch_size=16", "train.samples=1",
        "train.learning_rate=0.02", "train.dtype=fp32", "export.formats=[safetensors,peft]", "tracking=off",
        "device=cpu", f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "train", *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tokens are learnt" in done.stdout and "rows end in a learnt" in done.stdout
    for name in ("safetensors", "peft"):
        proof = json.loads((tmp_path / "run" / "export" / name / "export.json").read_text())
        assert proof["passed"], proof
        assert "AutoModelForSeq2SeqLM" in proof["runtime"] or name == "peft"
    saved = json.loads((tmp_path / "run" / "export" / "peft" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_2_SEQ_LM"
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "export" / "safetensors")
    assert merged.generate(torch.tensor([tokenizer("copy red blue")["input_ids"]]), max_new_tokens=3).shape[1] <= 4
    assert "copy " in (tmp_path / "run" / "samples.md").read_text()


@pytest.mark.parametrize(("kind", "objective", "words"), [
    ("t5", "sft", "holds a t5 model, which is no causal language model: objective=seq2seq trains it"),
    ("llama", "seq2seq", "holds a llama model, which is no sequence-to-sequence model: objective=sft trains it"),
])  # fmt: skip
def test_the_wrong_kind_of_model_is_told_with_the_right_objective(
    kind: str, objective: str, words: str, tmp_path: Path
) -> None:
    from finetune.model.config import ModelConfig
    from finetune.model.load import skeleton
    from finetune.model.task import Task

    (transformers.LlamaConfig() if kind == "llama" else config(kind)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words) as raised:
        skeleton(ModelConfig(path=str(tmp_path)), Task("seq2seq" if objective == "seq2seq" else "causal_lm"))
    assert "\n" not in str(raised.value)
