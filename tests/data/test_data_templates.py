"""Which chat template is used, what it writes, and where the learnt parts of it stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.conversation import BadRow, Conversation, Turn
from finetune.data.templates import ChatTemplate, Rendered, check_chat_template, choose_template, render
from finetune.errors import ConfigError


def chat(*texts: str, system: str = "", tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A conversation of user and assistant in turn."""
    turns = [Turn("user" if i % 2 == 0 else "assistant", text, learn=i % 2 == 1) for i, text in enumerate(texts)]
    return Conversation((*([Turn("system", system)] if system else []), *turns), tools)


def learnt(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def written(setting: str, conversation: Conversation, tokenizer: Any, kind: str = "chat") -> Rendered:
    return render(conversation, choose_template(setting, tokenizer, {kind}), tokenizer)


def test_guanaco_writes_what_openassistant_guanaco_does(plain_tokenizer: Any, bos_tokenizer: Any) -> None:
    rendered = written("guanaco", chat("Hi", "Hello", "Bye", "See you", system="Be kind."), plain_tokenizer)
    assert rendered.text == (
        "Be kind.\n### Human: Hi### Assistant: Hello<|end|>### Human: Bye### Assistant: See you<|end|>"
    )
    assert learnt(rendered) == [" Hello<|end|>", " See you<|end|>"]
    assert rendered.answer == "Hello"
    assert written("guanaco", chat("a", "b"), bos_tokenizer).text == "<|start|>### Human: a### Assistant: b<|end|>"


def test_alpaca_writes_what_stanford_alpaca_does(plain_tokenizer: Any) -> None:
    question = Conversation((Turn("user", "Sort.", context="b a"), Turn("assistant", "a b", learn=True)))
    rendered = written("alpaca", question, plain_tokenizer, "instruction")
    assert rendered.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\na b<|end|>"
    )
    assert learnt(rendered) == ["a b<|end|>"]
    assert written("alpaca", chat("Count.", "1 2"), plain_tokenizer).text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Response:\n1 2<|end|>"
    )
    several = written("alpaca", chat("a", "b", "c", "d", system="S"), plain_tokenizer)
    assert several.text == (
        "S\n\n### Instruction:\na\n\n### Response:\nb<|end|>\n\n### Instruction:\nc\n\n### Response:\nd<|end|>"
    )
    assert learnt(several) == ["b<|end|>", "d<|end|>"]


def test_chatml_ends_answers_with_eos_unless_it_is_the_end_of_turn(plain_tokenizer: Any) -> None:
    rendered = written("chatml", chat("a", "b", "c", "d"), plain_tokenizer)
    assert learnt(rendered) == ["b<|im_end|><|end|>", "d<|im_end|><|end|>"]
    assert rendered.text.startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|><|end|>\n<|im_start|>user"
    )
    from copy import deepcopy

    same = deepcopy(plain_tokenizer)
    same.eos_token = "<|im_end|>"
    assert learnt(written("chatml", chat("a", "b"), same)) == ["b<|im_end|>"]


def test_auto_is_the_tokenizers_own_else_by_the_kind_of_rows(plain_tokenizer: Any) -> None:
    from copy import deepcopy

    def said(kinds: set[str], tokenizer: Any) -> str:
        template = choose_template("auto", tokenizer, kinds)
        assert template is not None
        return template.said

    assert said({"chat"}, plain_tokenizer) == "guanaco (the tokenizer has none, data.chat_template=auto)"
    assert said({"instruction"}, plain_tokenizer) == "alpaca (the tokenizer has none, data.chat_template=auto)"
    assert said({"chat", "instruction", "text"}, plain_tokenizer).startswith("guanaco")
    assert choose_template("auto", plain_tokenizer, {"text"}) is None
    own = deepcopy(plain_tokenizer)
    own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert said({"chat"}, own) == "the tokenizer's own"
    own.chat_template = {"default": own.chat_template, "tool_use": "{{ messages }}"}
    assert said({"chat"}, own) == "the tokenizer's own"
    own.chat_template = {"a": "{{ messages }}", "b": "{{ messages }}"}
    with pytest.raises(ConfigError, match=r"several chat templates and no default \(a, b\): set data.chat_template"):
        said({"chat"}, own)


def test_no_token_is_added(plain_tokenizer: Any) -> None:
    before = len(plain_tokenizer)
    for name in ("guanaco", "alpaca", "chatml"):
        written(name, chat("a", "b"), plain_tokenizer)
    assert len(plain_tokenizer) == before


def test_a_file_is_a_template(tmp_path: Path, plain_tokenizer: Any) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    check_chat_template(str(path))
    rendered = written(str(path), chat("a", "b"), plain_tokenizer)
    assert (rendered.text, learnt(rendered)) == ("[user]a[assistant]b", ["b"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"expected auto \| guanaco \| alpaca \| chatml \| a file that exists"),
        (b"{% for m in messages %}", "does not parse at line 1: "),
        (b"hello {{ text }}", "is no chat template: it never mentions `messages`"),
        (b"\xff messages", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_template_is_refused_early(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        check_chat_template(str(path))


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data.chat_template is 'guanako'.*did you mean 'guanaco'\?"):
        check_chat_template("guanako")


def with_template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "test")


def test_a_template_cannot_reach_out_of_the_sandbox(plain_tokenizer: Any) -> None:
    evil = with_template("{{ messages.__class__.__mro__[-1].__subclasses__() }}")
    with pytest.raises(BadRow, match="the chat template refuses it: access to attribute '__class__'"):
        render(chat("a", "b"), evil, plain_tokenizer)


def test_a_template_that_refuses_a_conversation_is_a_faulty_row(plain_tokenizer: Any) -> None:
    strict = with_template(
        "{{ raise_exception('roles must alternate') if messages|length > 2 else messages[0].content }}"
    )
    with pytest.raises(BadRow, match="the chat template refuses it: roles must alternate"):
        render(chat("a", "b", "c", "d"), strict, plain_tokenizer)


def test_a_turn_that_a_template_leaves_out_is_seen(plain_tokenizer: Any) -> None:
    deaf = with_template("{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(BadRow, match=r"the chat template leaves out turn 1 \(system\)"):
        render(chat("a", "b", system="important"), deaf, plain_tokenizer)


def test_a_beginning_that_changes_with_what_follows_is_seen(plain_tokenizer: Any) -> None:
    changing = with_template("{{ messages|length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(BadRow, match=r"writes turns 1 to 2 differently once more turns follow.*{% generation %}"):
        render(chat("a", "b", "c", "d"), changing, plain_tokenizer)


def test_a_prompt_that_opens_a_thought_does_not_hide_the_answer(plain_tokenizer: Any) -> None:
    thinking = with_template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    assert learnt(render(chat("q", "an answer"), thinking, plain_tokenizer)) == ["an answer;"]


def test_white_space_behind_an_end_of_turn_token_is_not_learnt(plain_tokenizer: Any) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    rendered = render(chat("a", "b \n", "c", "d"), with_template(source), plain_tokenizer)
    assert [text.endswith("<|im_end|>") for text in learnt(rendered)] == [True, True]


TRAINING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_generation_marks_and_prefixes_agree(tokenizer: Any) -> None:
    unmarked = TRAINING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    conversation = chat("What is it?", "It is a cat.", "And this?", "A mat.\n\nYes: ", system="S")
    marked = render(conversation, with_template(TRAINING), tokenizer)
    assert marked == render(conversation, with_template(unmarked), tokenizer)
    assert learnt(marked) == ["It is a cat.<|im_end|>", "A mat.\n\nYes: <|im_end|>"]


def test_generation_marks_of_unlearnt_answers_are_left_out(plain_tokenizer: Any) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "bad"), Turn("user", "b"), Turn("assistant", "good", learn=True))
    assert learnt(render(Conversation(turns), with_template(TRAINING), plain_tokenizer)) == ["good<|im_end|>"]
    empty = with_template(
        TRAINING.replace("{{ m.content }}<|im_end|>{% endg", "{% endg{{").replace("{% endg{{", "{% endg")
    )
    with pytest.raises(BadRow, match=r"leaves out turn|marks 0 of 2 answers"):
        render(Conversation(turns), empty, plain_tokenizer)


TOOL = {"type": "function", "function": {"name": "search", "description": "d", "parameters": {}}}
CALL = {"name": "search", "arguments": {"q": "cat"}}
TOOL_TURNS = (
    Turn("user", "find"), Turn("assistant", "", learn=True, calls=(CALL,)), Turn("tool", "[1, 2]"),
    Turn("assistant", "found", learn=True),
)  # fmt: skip


def test_tools_are_told_in_words_where_a_template_has_no_place_for_them(plain_tokenizer: Any) -> None:
    rendered = written("guanaco", Conversation(TOOL_TURNS, (TOOL,)), plain_tokenizer)
    assert rendered.text == (
        'Tools:\n[{"name": "search", "description": "d", "parameters": {}}]\n'
        '### Human: find### Assistant: {"name": "search", "arguments": {"q": "cat"}}<|end|>'
        "### Tool: [1, 2]### Assistant: found<|end|>"
    )
    assert learnt(rendered) == [' {"name": "search", "arguments": {"q": "cat"}}<|end|>', " found<|end|>"]
    assert rendered.answer == '{"name": "search", "arguments": {"q": "cat"}}'
    assert "<|im_start|>user\n[1, 2]<|im_end|>" in written("chatml", Conversation(TOOL_TURNS), plain_tokenizer).text


def test_tools_reach_a_template_that_knows_them(plain_tokenizer: Any) -> None:
    knowing = with_template(
        "{% for t in tools %}{{ t.function.name }};{% endfor %}"
        "{% for m in messages %}<{{ 'result' if m.role == 'tool' else m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rendered = render(Conversation(TOOL_TURNS, (TOOL,)), knowing, plain_tokenizer)
    assert rendered.text == 'search;<user>find<assistant>CALL search {"q": "cat"}<result>[1, 2]<assistant>found'
    assert learnt(rendered) == ['CALL search {"q": "cat"}', "found"]


def test_plain_text_is_taken_as_it_is(bos_tokenizer: Any) -> None:
    conversation = Conversation((Turn("user", "Q: a\nA: "), Turn("assistant", "b", learn=True)), plain=True)
    rendered = render(conversation, None, bos_tokenizer)
    assert rendered == Rendered("Q: a\nA: b", ((8, 9),), "b", templated=False)
