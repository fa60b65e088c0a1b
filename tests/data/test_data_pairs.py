"""Rows of an encoder and its decoder: which tokens are read, which are written, and what a batch of them is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import finetune.assets
from finetune.config import RunConfig
from finetune.data.batching import collate, eval_batches
from finetune.data.config import DataConfig
from finetune.data.prepare import prepare
from finetune.data.rows import IGNORE, PairBatch, TokenRows
from finetune.errors import ConfigError, DataError
from finetune.training.objectives.seq2seq import Seq2SeqConfig
from finetune.training.window import learnt_per_row


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(finetune.assets.__file__).parent / "tiny")


def prepared(tokenizer, tmp_path: Path, rows: list[dict], **settings: object):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), cache_dir=str(tmp_path / "cache"), **settings)
    return prepare(config, tokenizer, context=64, seed=0, pairs=True)


PAIRS = [{"prompt": f"say {i}", "completion": "word " * (1 + i % 3)} for i in range(40)]


def test_prompts_are_read_and_answers_written(tokenizer, tmp_path: Path) -> None:
    data = prepared(tokenizer, tmp_path, PAIRS)
    assert data.template is None and len(data.train) + len(data.eval) == 40
    for row in data.train:
        read, written = row.input_ids[: row.source], row.labels[row.source :]
        assert tokenizer.decode(read).startswith("say ")
        assert tokenizer.decode(written[:-1]).split() in (["word"], ["word"] * 2, ["word"] * 3)
        assert written[-1] == tokenizer.eos_token_id
        assert (row.labels[: row.source] == IGNORE).all()
        assert (row.input_ids[row.source :] == written).all()
    learnt = learnt_per_row(data.train)
    assert learnt.tolist() == [len(row.labels) - row.source for row in data.train]
    sample = data.prompts[0]
    assert sample.prompt_ids == tokenizer(sample.prompt)["input_ids"] and sample.reference.startswith("word")
    assert prepared(tokenizer, tmp_path, PAIRS).report.cached
    assert prepared(tokenizer, tmp_path, PAIRS).train.sources.tolist() == data.train.sources.tolist()


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"instruction": "Sum up.", "input": "A long text.", "output": "Text."}, "Sum up.\n\nA long text."),
        ({"system": "Be brief.", "prompt": "Why?", "completion": "So."}, "Be brief.\n\nWhy?"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, "Hi"),
    ],
)
def test_instructions_are_read_without_a_template(row: dict, read: str, tokenizer, tmp_path: Path) -> None:
    data = prepared(tokenizer, tmp_path, [row])
    (only,) = data.train
    assert tokenizer.decode(only.input_ids[: only.source]) == read


def test_a_template_writes_what_is_read(tokenizer, tmp_path: Path) -> None:
    rows = [{"article": "It rains.", "completion": "Rain."}]
    (only,) = prepared(tokenizer, tmp_path, rows, template="summarize: {article}").train
    assert tokenizer.decode(only.input_ids[: only.source]) == "summarize: It rains."


def test_batches_pad_each_side_by_itself(tokenizer, tmp_path: Path) -> None:
    rows = prepared(tokenizer, tmp_path, PAIRS).train
    order = np.argsort(rows.lengths())
    batch = collate(rows, [[int(order[0])], [int(order[-1])]], pad_id=7)
    assert isinstance(batch, PairBatch) and isinstance(batch.to("cpu"), PairBatch)
    short, long = rows[int(order[0])], rows[int(order[-1])]
    assert batch.input_ids_BS.shape[1] == max(short.source, long.source)
    assert batch.labels_BS.shape[1] == max(len(r.labels) - r.source for r in (short, long))
    assert batch.attention_mask_BS.sum(1).tolist() == [short.source, long.source]
    assert (batch.input_ids_BS[batch.attention_mask_BS == 0] == 7).all()
    assert batch.target_tokens() == int(learnt_per_row(rows)[[order[0], order[-1]]].sum())
    inputs = batch.model_inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "use_cache"}
    seen = sum(batch.target_tokens() for batch in eval_batches(rows, 4, 0))
    assert seen == int(learnt_per_row(rows).sum())
    assert TokenRows.of(list(rows)).sources.dtype == rows.sources.dtype == np.int32


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_sides_that_are_too_long(policy: str, tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a b c d e f g h i j k l m n o p", "completion": "no " * 30}, {"prompt": "a", "completion": "b"}]
    settings = {"max_length": 6, "too_long": policy}
    if policy == "error":
        with pytest.raises(DataError, match=r"a side of the row has \d+ tokens and data.max_length is 6"):
            prepared(tokenizer, tmp_path, rows, **settings)
        return
    data = prepared(tokenizer, tmp_path, rows, **settings)
    kept = [*data.train, *data.eval]
    assert len(kept) == (2 if policy == "truncate" else 1)
    if policy == "truncate":
        cut = max(kept, key=lambda row: len(row.labels))
        assert cut.source == 6 and len(cut.labels) == 12
        assert cut.labels[-1] == tokenizer.eos_token_id  # it still learns to stop


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "nothing to answer"}, "has nothing to read before its answer"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]}, "has 2 answers to learn"),
    ],
)
def test_rows_that_are_no_pairs_are_told(row: dict, words: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as raised:
        prepared(tokenizer, tmp_path, [row] * 3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing": True}, "data.packing=true conflicts with objective=seq2seq"),
        ({"too_long": "split"}, "data.too_long=split conflicts with objective=seq2seq"),
        ({"chat_template": "alpaca"}, "data.chat_template=alpaca conflicts with objective=seq2seq"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        RunConfig(data=DataConfig(train="x.jsonl", **settings), objective=Seq2SeqConfig())
    assert "\n" not in str(raised.value)


def test_labels_and_logits_stand_at_the_same_places(tokenizer, tmp_path: Path) -> None:
    batch = collate(prepared(tokenizer, tmp_path, PAIRS).train, [[0], [1]], 0)
    assert torch.equal(batch.shifted_labels_BS(), batch.labels_BS)
