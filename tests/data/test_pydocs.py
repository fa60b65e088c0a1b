"""Rows and pretraining text from the standard library, and the embedded base that was made of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from finetune.assets import EMBEDDED
from finetune.data import pydocs
from finetune.data.pydocs import is_eval, normalised, pretraining_sources, pydocs_rows
from finetune.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def answers(split: str) -> list[str]:
    return [row["messages"][1]["content"] for row in pydocs_rows(split)]


def tree(directory: Path, **modules: str) -> Path:
    """Write modules, "__" in their names standing for a directory, as a small standard library."""
    for name, text in modules.items():
        path = directory.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


def name_on(side: bool, prefix: str) -> str:
    """Return a function name whose qualified name in `prefix` falls on the wanted side."""
    return next(f"f{i}" for i in range(1000) if is_eval(f"{prefix}.f{i}") == side)


def test_the_sides_are_disjoint_sorted_and_free_of_duplicates() -> None:
    train, held = pydocs_rows("train"), pydocs_rows("eval")
    for rows, side in ((train, False), (held, True)):
        names = [row["name"] for row in rows]
        assert names == sorted(set(names))
        assert all(is_eval(name) == side for name in names)
    everything = answers("train") + answers("eval")
    assert len(everything) == len(set(everything))
    assert len(train) > 1000
    assert 0.03 < len(held) / len(everything) < 0.10


def test_every_row_asks_for_its_name_and_answers_with_one_long_enough_paragraph() -> None:
    for row in pydocs_rows("train") + pydocs_rows("eval"):
        question, answer = (message["content"] for message in row["messages"])
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["name"] in question and question.endswith("?")
        assert len(answer) >= 40 and answer == normalised(answer)
        parts = row["name"].split(".")
        assert parts[0] not in pydocs.SKIP
        assert not any(part.startswith("_") for part in parts)


def test_rows_are_the_same_again_and_a_callers_changes_do_not_stay() -> None:
    first = pydocs_rows("eval")
    first[0]["messages"].clear()
    pydocs._rows.cache_clear()
    assert pydocs_rows("eval") == pydocs_rows("eval") != first


def test_the_hash_split_never_moves() -> None:
    assert [name for name in ("json.dumps", "stat.S_ISREG", "fnmatch.translate", "json.loads") if is_eval(name)] == [
        "stat.S_ISREG",
        "fnmatch.translate",
    ]


def test_rows_of_a_small_tree(tmp_path: Path) -> None:
    tree(
        tmp_path,
        good='class Box(dict):\n    """A box that holds whatever is put into it, in order.\n\n    More."""\n'
        "    def __init__(self, size=3): pass\n"
        '    async def open(self, *, hard: bool = False) -> int:\n        """Open the box,\n'
        '        by force where that is asked for, then wait."""\n'
        '    def _hidden(self):\n        """Nobody outside this module has a use for this one."""\n'
        '    def short(self):\n        """Too short."""\n'
        'try:\n    def late():\n        """Defined under a try, but public all the same, so it counts."""\n'
        "except ImportError:\n    pass\n",
        _private='def f():\n    """A function in a private module is nobody\'s business at all."""\n',
        test__case='def f():\n    """A function of the test suite is not documentation for users."""\n',
        broken="def f(:\n",
    )
    rows = pydocs_rows("train", tmp_path) + pydocs_rows("eval", tmp_path)
    assert {row["name"]: [message["content"] for message in row["messages"]] for row in rows} == {
        "good.Box": [
            "What is the class good.Box(self, size=3)?",
            "A box that holds whatever is put into it, in order.",
        ],
        "good.Box.open": [
            "What does good.Box.open(self, *, hard: bool=False) -> int do?",
            "Open the box, by force where that is asked for, then wait.",
        ],
        "good.late": ["What does good.late() do?", "Defined under a try, but public all the same, so it counts."],
    }


def test_an_answer_shared_by_both_sides_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    docstring = '(): \n    """The very same words stand on both of the sides."""\n'
    tree(tmp_path, m=f"def {name_on(True, 'm')}{docstring}def {name_on(False, 'm')}{docstring}")
    assert [row["name"] for row in pydocs_rows("train", tmp_path)] == [f"m.{name_on(False, 'm')}"]
    assert pydocs_rows("eval", tmp_path) == []


def test_pretraining_text_loses_evaluation_docstrings_and_their_copies(tmp_path: Path) -> None:
    held, kept = name_on(True, "m"), name_on(False, "m")
    secret = "Return what no model may have read before it is asked."
    tree(
        tmp_path,
        m=f'"""Modul\u00e9."""\ndef {held}(x):\n    """{secret}"""\n'
        f'def {kept}(x):\n    """Return what every model may read as much as it likes."""\n    return x\n',
        _copy=f'class C:\n    def g(self):\n        """{secret}\n\n        More."""\n        return "\u00e9"\n',
        spelt=f"HELP = '{secret}'\n",
    )
    sources = {source.module: source for source in pretraining_sources(tmp_path)}
    assert sorted(sources) == ["_copy", "m"]
    assert sources["_copy"].text == 'class C:\n    def g(self):\n        return "\u00e9"\n'
    assert sources["m"].text.startswith(f'"""Modul\u00e9."""\ndef {held}(x):\n    pass\ndef {kept}')
    assert sources["m"].docstrings == ["Modul\u00e9.", "Return what every model may read as much as it likes."]


def test_no_evaluation_answer_is_in_the_pretraining_text_of_this_interpreter() -> None:
    held = answers("eval")
    names = set()
    for source in pretraining_sources():
        ast.parse(source.text)  # what was cut leaves a valid program
        names.add(source.module)
        text = normalised(source.text) + "\n" + normalised(" ".join(source.docstrings))
        assert [answer for answer in held if answer in text] == [], source.module
    assert {"json", "argparse"} <= names
    assert not any(name.split(".")[0] in pydocs.SKIP for name in names)


@pytest.mark.parametrize(
    "make", [lambda path: path, lambda path: path / "absent", lambda path: tree(path, bare="x = 1")]
)
def test_absent_sources_are_one_line_with_the_way_out(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    monkeypatch.setattr(pydocs, "stdlib_directory", lambda: directory)
    with pytest.raises(DataError) as caught:
        pydocs_rows("train")
    message = str(caught.value)
    assert str(directory) in message and "data.train=your.jsonl" in message and "\n" not in message


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'"):
        pydocs_rows("test")  # type: ignore[arg-type]


# The embedded base.


def test_the_embedded_base_has_the_shape_and_size_that_was_promised() -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 8
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    widths = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
    assert [config[width] % 64 for width in widths] == [0] * len(widths)
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 12e6


def test_the_embedded_base_beats_the_five_gram() -> None:
    result = json.loads((ROOT / "benchmarks/results/pretrain_tiny.json").read_text())
    assert result["bits_per_byte"]["model"] < result["bits_per_byte"]["5-gram"]
    assert len(result["curve"]) >= 10
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]


def test_the_five_gram_is_an_honest_distribution_that_uses_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from ngram import NGram

    rng = np.random.default_rng(0)
    stream = np.concatenate([np.tile([1, 2, 3, 4, 5, 6], 200), rng.integers(0, 20, 800)])
    model = NGram(stream, vocab_size=20)
    for context in ([1, 2, 3, 4], [19, 18, 17, 16], [7], []):
        last = [model.probabilities(np.array([0, *context, token]))[-1] for token in range(20)]
        assert sum(last) == pytest.approx(1.0) and min(last) > 0
    assert model.probabilities(np.array([1, 2, 3, 4, 5]))[-1] > 0.8
    assert model.bits(np.tile([1, 2, 3, 4, 5, 6], 20)) < 119


def test_the_embedded_base_loads_in_stock_transformers_and_continues_text() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model, info = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    ids = tokenizer("import os\nimport sys\n\n\ndef main():\n    return", return_tensors="pt")
    with torch.no_grad():
        loss = model(**ids, labels=ids["input_ids"]).loss
    assert loss < 6.0  # a guess among 4096 tokens costs 8.3 nats
    assert model.generate(**ids, max_new_tokens=8, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_tokens_cover_every_byte_and_add_nothing() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(EMBEDDED)
    text = "def f(x):\n\treturn 'caf\u00e9 \U0001f600 \x00'\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_chat_template_of_a_prefix_is_a_prefix_and_learns_answers_with_their_end() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(EMBEDDED)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does f(x) do?"},
        {"role": "assistant", "content": "Return x."},
        {"role": "user", "content": [{"type": "text", "text": "And g?"}]},
        {"role": "assistant", "content": "Nothing."},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == (
        "Be brief.\nQuestion: What does f(x) do?\nAnswer: Return x.<|endoftext|>\n"
        "Question: And g?\nAnswer: Nothing.<|endoftext|>"
    )
    for end in range(1, len(messages) + 1):
        asks = messages[end - 1]["role"] == "user"
        prefix = tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=asks)
        assert whole.startswith(prefix) and (not asks or prefix.endswith("\nAnswer:"))
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == " Return x.<|endoftext|> Nothing.<|endoftext|>"
