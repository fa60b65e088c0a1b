"""From files to prepared rows, through every decision on the way."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from data_rows import Write, questions, ready, texts

from finetune.data.report import DataReport
from finetune.data.rows import IGNORE
from finetune.errors import ConfigError, DataError


def test_a_file_becomes_rows_held_out_rows_a_template_and_prompts(write: Write, plain_tokenizer: Any) -> None:
    data = ready(write(questions(100)), plain_tokenizer)
    assert (len(data.train), len(data.eval)) == (84, 16)
    assert all(
        text.endswith("<|end|>]]") and "### Response:\n[[the answer" in text
        for text in texts(data.train, plain_tokenizer)
    )
    assert not set(texts(data.train, plain_tokenizer)) & set(texts(data.eval, plain_tokenizer))
    assert data.template is not None and "### Response" in data.template
    lines = "\n".join(data.report.lines())
    assert "100 rows of" in lines and "(prompt_completion)" in lines
    assert "chat template: alpaca (the tokenizer has none, data.chat_template=auto)" in lines
    assert "84 rows to learn from" in lines and "16 rows held out of data.train by a hash of the prompt" in lines
    counted = int((data.train.labels != IGNORE).sum())
    assert (data.report.train_tokens, data.report.train_learnt) == (len(data.train.input_ids), counted)


def test_prompts_are_held_out_and_end_where_an_answer_begins(write: Write, bos_tokenizer: Any) -> None:
    data = ready(write(questions(100)), bos_tokenizer)
    assert len(data.prompts) == 16
    held = texts(data.eval, bos_tokenizer)
    for prompt in data.prompts:
        assert prompt.prompt.endswith("### Response:\n") and prompt.reference.startswith("the answer")
        assert f"{prompt.prompt}[[{prompt.reference}<|end|>]]" in held
        assert prompt.prompt_ids.count(bos_tokenizer.bos_token_id) == 1
        assert bos_tokenizer.decode(prompt.prompt_ids) == prompt.prompt


def test_prompt_tokens_begin_with_one_bos_and_end_with_no_eos(bos_tokenizer: Any) -> None:
    from tokenizers import processors

    start, end = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    both = deepcopy(bos_tokenizer)
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    for tokenizer in (bos_tokenizer, both):
        for template in ("<|start|>{prompt}:", "{prompt}:"):
            for item in ready(questions(20), tokenizer, template=template).prompts:
                assert item.prompt_ids.count(start) == 1 and item.prompt_ids[0] == start and end not in item.prompt_ids


def test_the_saved_template_writes_the_same_prompts(write: Write, bos_tokenizer: Any) -> None:
    data = ready(write(questions(20)), bos_tokenizer)
    serving = deepcopy(bos_tokenizer)
    serving.chat_template = data.template
    question = data.prompts[0].prompt.split("### Instruction:\n")[1].split("\n\n")[0]
    messages = [{"role": "user", "content": question}]
    served = serving.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert served == data.prompts[0].prompt_ids


def test_the_held_out_rows_depend_on_neither_order_nor_seed(write: Write, plain_tokenizer: Any) -> None:
    rows = questions(60) + questions(40)
    first = ready(write(rows), plain_tokenizer)
    random.Random(1).shuffle(rows)
    second = ready(write(rows, "shuffled.jsonl"), plain_tokenizer, seed=7)
    assert sorted(texts(first.eval, plain_tokenizer)) == sorted(texts(second.eval, plain_tokenizer))
    assert [item.prompt for item in first.prompts] == [item.prompt for item in second.prompts]


def test_rows_in_memory_and_tiny_data(plain_tokenizer: Any) -> None:
    one = ready([{"text": "only one"}], plain_tokenizer)
    assert (len(one.train), len(one.eval)) == (1, 0)
    assert any("too few different rows to hold any out" in line for line in one.report.lines())
    assert one.template is None and one.prompts == []
    five = ready(questions(5), plain_tokenizer)
    assert (len(five.train), len(five.eval)) == (4, 1)


def test_prompts_are_those_of_the_held_out_rows_across_sources_and_chunks(write: Write, plain_tokenizer: Any) -> None:
    first: list[Any] = questions(300)
    first[299] = {"prompt": "long " * 200, "completion": "never reached"}
    data = ready([write(first, "a.jsonl"), write(questions(300, start=1000), "b.jsonl")], plain_tokenizer)
    assert data.report.train.faulty == 1
    held = texts(data.eval, plain_tokenizer)
    assert len(data.prompts) == len(held) == 16
    assert sorted(f"{item.prompt}[[{item.reference}<|end|>]]" for item in data.prompts) == sorted(held)
    numbers = [int(item.prompt.split("question ")[1].split()[0]) for item in data.prompts]
    assert min(numbers) < 300 <= 1000 <= max(numbers), "rows of both files are held out"


def test_a_row_with_several_faulty_answers_is_one_faulty_row(plain_tokenizer: Any) -> None:
    rows = [{"prompt": "long " * 100, "completion": ["a", "b", "c"]}, *questions(9)]
    data = ready(rows, plain_tokenizer, max_length=64, chat_template="chatml", max_bad_fraction=0.1)
    assert data.report.train.faulty == 1


def test_a_list_of_answers_gives_rows_that_stay_on_one_side(plain_tokenizer: Any) -> None:
    rows = [{"mr": f"name {i}", "refs": [f"one {i}", f"two {i}", f"three {i}"]} for i in range(40)]
    data = ready(rows, plain_tokenizer, columns={"prompt": "mr", "completion": "refs"})
    assert len(data.train) + len(data.eval) == 120
    assert data.report.train.examples == 120 and data.report.train.rows == 40
    sides = [{text.split("[[")[0] for text in texts(side, plain_tokenizer)} for side in (data.train, data.eval)]
    assert not sides[0] & sides[1] and len(data.eval) % 3 == 0
    assert any("40 rows giving 120 examples" in line for line in data.report.lines())


def test_faulty_rows_are_skipped_and_shown_up_to_the_fraction(write: Write, plain_tokenizer: Any) -> None:
    rows: list[Any] = questions(299)
    rows[9] = '{"prompt": "q", "completion": '
    rows[19] = {"prompt": "q", "completion": ""}
    path = write(rows)
    data = ready(path, plain_tokenizer)
    assert data.report.train.faulty == 2 and data.report.train.rows == 299
    shown = next(line for line in data.report.lines() if "faulty rows skipped" in line)
    assert f"2 faulty rows skipped: {path}:10: is not JSON: " in shown
    assert f"{path}:20: the answer is empty (turn 2)" in shown
    rows[29] = {"prompt": "q"}
    with pytest.raises(DataError) as caught:
        ready(write(rows), plain_tokenizer)
    message = str(caught.value)
    assert message.startswith("data.train: 3 of 299 rows are faulty (1 %, data.max_bad_fraction=0.01 allows 1 %): ")
    assert f"{path}:30: has no 'completion'" in message and "\n" not in message and caught.value.exit_code == 2
    assert ready(write(rows), plain_tokenizer, max_bad_fraction=0.02).report.train.faulty == 3


def test_faults_of_rows_from_every_kind_of_source(tmp_path: Path, plain_tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\np,c\np,\n")
    with pytest.raises(DataError, match=r"1 of 2 rows are faulty.*a\.csv:3: the answer is empty"):
        ready(str(tmp_path / "a.csv"), plain_tokenizer)
    with pytest.raises(DataError, match=r"data\.train row:2: is a number: expected an object with columns"):
        ready([{"text": "a"}, 3], plain_tokenizer)


def test_nothing_usable_is_refused_whatever_the_fraction(plain_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"none of 2 rows can be used: .*the text is empty"):
        ready([{"text": " "}, {"text": ""}], plain_tokenizer, max_bad_fraction=1.0)


def test_all_labels_masked_is_refused_and_says_so(plain_tokenizer: Any) -> None:
    rows = [{"prompt": "long " * 100, "completion": "never reached"}] * 3
    with pytest.raises(
        DataError, match=r"3 of 3 rows are faulty.*nothing to learn within 32 tokens: its prompt is longer"
    ):
        ready(rows, plain_tokenizer, max_length=32)


def test_too_long_rows_are_counted_and_treated_as_asked(plain_tokenizer: Any) -> None:
    rows = [{"text": "the cat sat on the mat. " * 20}, *({"text": f"the cat {i}"} for i in range(10))]

    def lengths(policy: str) -> tuple[int, int]:
        data = ready(rows, plain_tokenizer, max_length=32, too_long=policy, eval=[{"text": "other"}])
        assert data.report.train.too_long == 1
        done = {"truncate": "truncated", "drop": "dropped", "split": "split"}[policy]
        assert any(f"1 rows longer than 32 tokens {done}" in line for line in data.report.lines())
        return len(data.train), int(data.train.lengths().max())

    assert lengths("truncate") == (11, 32)
    assert lengths("drop")[0] == 10
    assert lengths("split")[0] > 12
    with pytest.raises(DataError, match=r"data\.train row:1: the row has \d+ tokens and data.max_length is 32"):
        ready(rows, plain_tokenizer, max_length=32, too_long="error")


def test_every_row_too_long_is_refused(plain_tokenizer: Any) -> None:
    rows = [{"text": "the cat sat on the mat. " * 20}] * 4
    with pytest.raises(DataError) as caught:
        ready(rows, plain_tokenizer, max_length=16, too_long="drop")
    assert str(caught.value) == (
        "data.train: none of 4 rows can be used: 4 are longer than 16 tokens (data.max_length) and data.too_long=drop"
    )


def test_a_context_longer_than_the_models_is_refused(plain_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length is 1024, more than the model's context of 256 tokens"):
        ready([{"text": "a"}], plain_tokenizer, max_length=1024)


def test_weights_repeat_whole_parts_and_draw_the_rest(write: Write, plain_tokenizer: Any) -> None:
    a, b = write(questions(100), "a.jsonl"), write(questions(100, start=1000), "b.jsonl")
    held = write([{"prompt": "x", "completion": "y"}], "e.jsonl")

    def count(weights: dict[str, float], seed: int = 0) -> tuple[int, int]:
        found = texts(ready(weights, plain_tokenizer, seed=seed, eval=held).train, plain_tokenizer)
        of_b = sum("question 1" in text and int(text.split("question ")[1].split("\n")[0]) >= 1000 for text in found)
        return len(found) - of_b, of_b

    assert count({a: 2.0, b: 1.0}) == (200, 100)
    halves = count({a: 1.0, b: 0.5})
    assert halves[0] == 100 and 30 < halves[1] < 70
    assert count({a: 1.0, b: 0.5}) == halves
    with pytest.raises(DataError, match=r"the weights leave no row to learn from"):
        ready({write(questions(1), "c.jsonl"): 1e-9}, plain_tokenizer, eval=held)


def test_rows_for_evaluation_that_are_also_learnt_are_counted(write: Write, plain_tokenizer: Any) -> None:
    data = ready(write(questions(30)), plain_tokenizer, eval=write(questions(10, start=25), "e.jsonl"))
    assert (len(data.train), len(data.eval), data.report.shared) == (30, 10, 5)
    assert any("5 of the rows for evaluation are also learnt from" in line for line in data.report.lines())
    assert any("10 rows for evaluation" in line for line in data.report.lines())


def test_pydocs_has_its_own_held_out_half(plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.data import pydocs

    def rows(split: str) -> list[dict[str, Any]]:
        def talk(i: int) -> list[dict[str, str]]:
            return [
                {"role": "user", "content": f"{split} {i}?"},
                {"role": "assistant", "content": f"{split} answer {i}"},
            ]

        return [{"name": f"{split}.{i}", "messages": talk(i)} for i in range(40)]

    monkeypatch.setattr(pydocs, "pydocs_rows", rows)
    data = ready("pydocs", plain_tokenizer)
    assert len(data.train) == 40 and all("train" in text for text in texts(data.train, plain_tokenizer))
    assert len(data.eval) == 40 and all("eval" in text for text in texts(data.eval, plain_tokenizer))
    assert "guanaco" in data.report.template and len(data.prompts) == 32
    mixed = ready(["pydocs", "pydocs"], plain_tokenizer)
    assert len(mixed.train) == 80


def test_text_prompts_break_off_behind_a_word(write: Write, plain_tokenizer: Any) -> None:
    data = ready(
        [{"text": f"Once upon a time there was a cat {i}. She sat on the mat and said hello."} for i in range(40)],
        plain_tokenizer,
    )
    sample = data.prompts[0]
    assert sample.prompt.startswith("Once upon") and sample.prompt.endswith(" ") and sample.reference
    assert data.template is None and not data.report.template


def test_a_tokenizer_without_eos_is_said_aloud(plain_tokenizer: Any) -> None:
    tokenizer = deepcopy(plain_tokenizer)
    tokenizer.eos_token = None
    notes = ready(questions(8), tokenizer).report.notes
    assert "the tokenizer has no end-of-text token: the model will not learn to stop" in notes


def test_straddling_tokens_are_said_aloud(stories_tokenizer: Any) -> None:
    rows = [{"q": f"One day there {i}", "a": "was a girl"} for i in range(8)]
    data = ready(rows, stories_tokenizer, template="{q} there", columns={"completion": "a"})
    plain = ready(
        [{**row, "a": " was a girl"} for row in rows],
        stories_tokenizer,
        template="{q} there",
        columns={"completion": "a"},
    )
    assert data.report.train.straddling == 0 < plain.report.train.straddling == 8
    assert any("in 8 rows one token spans the end of the prompt" in line for line in plain.report.lines())


def test_a_report_survives_json(write: Write, plain_tokenizer: Any) -> None:
    report = ready(write(questions(20)), plain_tokenizer).report
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


# real rows


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("instruct/llms_from_scratch_1100.jsonl", {}, "1078 rows to learn from"),
        pytest.param("instruct/alpaca_2k.jsonl", {}, "1960 rows to learn from", marks=pytest.mark.slow),
        ("chat/sgd_dev_100.jsonl", {}, "(messages)"),
        ("chat/glaive_toolcall_300.jsonl", {"too_long": "drop"}, "(sharegpt)"),
        ("sql/wikisql_dev.jsonl", {"columns": {"prompt": "question", "completion": "sql"}}, "980 rows to learn from"),
        pytest.param(
            "nlg/e2e_dev.jsonl",
            {"columns": {"completion": "refs"}, "template": "{mr} -> "},
            "4672 examples",
            marks=pytest.mark.slow,
        ),
        ("lm/tinystories_train.jsonl", {}, "931 rows to learn from"),
    ],
)
def test_real_files_with_a_real_tokenizer(
    file: str, settings: dict[str, Any], words: str, shared_data: Path, stories_tokenizer: Any
) -> None:
    data = ready(str(shared_data / file), stories_tokenizer, context=512, **settings)
    assert words in "\n".join(data.report.lines())
    whole = data.train.lengths() < 512
    ends = data.train.input_ids[data.train.offsets[1:] - 1]
    assert (ends[whole] == stories_tokenizer.eos_token_id).all(), "every row that was not cut ends with EOS"
    assert (data.train.labels[data.train.offsets[:-1]] == IGNORE).all(), "no first token is learnt"
    assert 0 < data.report.train_learnt < data.report.train_tokens


def test_nested_rows_say_what_was_seen(shared_data: Path, stories_tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"no format recognised: its rows have id, name, instruction, instances \(a list"
    ):
        ready(str(shared_data / "instruct/self_instruct_seed_175.jsonl"), stories_tokenizer)
