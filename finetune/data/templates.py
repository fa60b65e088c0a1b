"""Chat templates: which one is used, and what a conversation reads like in it.

guanaco    "### Human: ...### Assistant: ..." of OpenAssistant-Guanaco (QLoRA, arXiv:2305.14314), EOS behind each answer
alpaca     the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), a line end after "### Response:"
chatml     "<|im_start|>role\\n...<|im_end|>" as plain text: no token is added to a tokenizer that has none for it

They begin with the tokenizer's BOS where the tokenizer would add one, because text from a chat template is tokenized
without special tokens, here and in every runtime that applies the template itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Turn
from finetune.errors import ConfigError, nearest

_ALPACA_INPUT = "\n\n### Input:\n"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

BUILT_IN = {
    "guanaco": (
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content + '\\n' }}"
        "{%- elif message.role == 'assistant' -%}"
        "{{ '### Assistant: ' + message.content + eos_token|default('', true) }}"
        "{%- else -%}{{ ('### Tool: ' if message.role == 'tool' else '### Human: ') + message.content }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Assistant:' }}{%- endif -%}"
    ),
    "alpaca": (
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}"
        "{%- elif message.role == 'assistant' -%}"
        "{{ '### Response:\\n' + message.content + eos_token|default('', true) }}"
        "{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}"
        "{%- elif message.role == 'tool' -%}{{ '### Tool:\\n' + message.content + '\\n\\n' }}"
        "{%- else -%}{%- if loop.first -%}{{ 'Below is an instruction that describes a task' }}"
        "{%- if '\\n\\n### Input:\\n' in message.content -%}"
        "{{ ', paired with an input that provides further context' }}{%- endif -%}"
        "{{ '. Write a response that appropriately completes the request.\\n\\n' }}{%- endif -%}"
        "{{ '### Instruction:\\n' + message.content + '\\n\\n' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}"
        "{%- if message.role == 'assistant' and eos_token and eos_token != '<|im_end|>' -%}{{ eos_token }}{%- endif -%}"
        "{{ '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and what it can say.

    Attributes:
        source: the template itself; saved with the adapter and the exports.
        said: which one it is and why, for the report.
        context_join: stands between a turn's text and its context.
    """

    source: str
    said: str
    context_join: str = "\n\n"

    @property
    def has_generation_marks(self) -> bool:
        """Whether the template marks by itself what is learnt, with `{% generation %}`."""
        return bool(_GENERATION.search(self.source))

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The conversation as the template's `messages`; what it has no place for is written into the text.

        Tool calls become JSON in the text where the template does not read `tool_calls`, tool turns become user turns
        where it knows no role "tool", and tools become part of the system turn where it does not read `tools`.
        """
        turns = list(conversation.turns)
        if conversation.tools and not self.reads("tools"):
            described = "Tools:\n" + json.dumps([tool["function"] for tool in conversation.tools], ensure_ascii=False)
            first = turns.pop(0).text + "\n\n" if turns[0].role == "system" else ""
            turns.insert(0, Turn("system", first + described))
        return [self._message(turn) for turn in turns]

    def reads(self, name: str) -> bool:
        """Whether the template mentions a variable or a role."""
        return re.search(rf"\b{name}\b", self.source) is not None

    def _message(self, turn: Turn) -> dict[str, Any]:
        text = turn.text + (self.context_join + turn.context if turn.context else "")
        if turn.role == "tool" and not re.search(r"""['"]tool['"]""", self.source):
            return {"role": "user", "content": text}
        if turn.calls and not self.reads("tool_calls"):
            spelled = "\n".join(json.dumps(call, ensure_ascii=False) for call in turn.calls)
            return {"role": turn.role, "content": f"{text}\n{spelled}" if text else spelled}
        message: dict[str, Any] = {"role": turn.role, "content": text}
        if turn.calls:
            message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in turn.calls]
        return message


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        spans: [start, end) in characters of what is learnt, in order.
        answer: the first answer, for showing.
        templated: written by a chat template, so that the tokenizer adds no special tokens of its own.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    answer: str
    templated: bool


def check_chat_template(setting: str) -> None:
    """Refuse a `data.chat_template` that is neither a name nor a readable Jinja file.

    Raises:
        ConfigError: naming the nearest name, or the line that does not parse.
    """
    if setting != "auto" and setting not in BUILT_IN:
        _from_file(setting)


def choose_template(setting: str, tokenizer: Any, kinds: set[str]) -> ChatTemplate | None:
    """The template for data of these kinds ("text", "instruction", "chat"); None where all of it is plain text.

    Args:
        setting: `data.chat_template`.
        tokenizer: of transformers.
        kinds: of the sources' formats.

    Raises:
        ConfigError: for a template that cannot be used, or a tokenizer with several and no default.
    """
    if kinds <= {"text"}:
        return None
    if setting == "auto" and tokenizer.chat_template:
        try:
            return ChatTemplate(tokenizer.get_chat_template(), "the tokenizer's own")
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise ConfigError(
                f"the tokenizer has several chat templates and no default ({names}): set data.chat_template"
            ) from None
    if setting != "auto" and setting not in BUILT_IN:
        return ChatTemplate(_from_file(setting), setting)
    name = setting if setting != "auto" else "guanaco" if "chat" in kinds else "alpaca"
    why = "" if setting != "auto" else " (the tokenizer has none, data.chat_template=auto)"
    source = ("{{- bos_token -}}" if adds_bos(tokenizer) else "") + BUILT_IN[name]
    return ChatTemplate(source, name + why, _ALPACA_INPUT if name == "alpaca" else "\n\n")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def render(conversation: Conversation, template: ChatTemplate | None, tokenizer: Any) -> Rendered:
    """The conversation as text, and where in it the learnt parts stand.

    An answer's part begins where the prompt for it ends (what the template writes with `add_generation_prompt`) and
    ends where the template's text for the turns up to it ends, so that the template's end-of-turn mark is learnt.
    Where the template has `{% generation %}` marks, those count.

    Raises:
        BadRow: when the template refuses the conversation, leaves a turn out, or writes its beginning differently once
        more
            turns follow.
    """
    answer = next(turn for turn in conversation.turns if turn.learn)
    if conversation.plain or template is None:
        spans, place = [], 0
        for turn in conversation.turns:
            if turn.learn:
                spans.append((place, place + len(turn.text)))
            place += len(turn.text)
        return Rendered("".join(turn.text for turn in conversation.turns), tuple(spans), answer.text, templated=False)
    messages = template.messages(conversation)
    learnt = [turn.learn for turn in conversation.turns]
    learnt = [False] * (len(messages) - len(learnt)) + learnt  # a system turn may have been put first
    write = _writer(template, tokenizer, list(conversation.tools) if template.reads("tools") else None)
    text = write(messages, False)
    for number, message in enumerate(messages, 1):
        content = message["content"].strip()  # a template may strip it, or write it as JSON
        if not any(form in text for form in (content, json.dumps(content, ensure_ascii=False)[1:-1])):
            raise BadRow(f"the chat template leaves out turn {number} ({message['role']})")
    if template.has_generation_marks:
        spans = _marked_spans(template, tokenizer, messages, conversation)
    else:
        spans = _answer_spans(write, text, messages, learnt)
    said = messages[learnt.index(True)]["content"] or json.dumps([dict(call) for call in answer.calls])
    return Rendered(text, tuple(_without_tail(text, span, tokenizer) for span in spans), said, templated=True)


Writer = Callable[[Sequence[dict[str, Any]], bool], str]


def _writer(template: ChatTemplate, tokenizer: Any, tools: list[dict[str, Any]] | None) -> Writer:
    import jinja2

    def write(messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=template.source, tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadRow(f"the chat template refuses it: {reason}") from None

    return write


def _answer_spans(
    write: Writer, text: str, messages: list[dict[str, Any]], learnt: list[bool]
) -> list[tuple[int, int]]:
    spans = []
    for i, learn in enumerate(learnt):
        if not learn:
            continue
        until = text if i + 1 == len(messages) else write(messages[: i + 1], False)
        prompt = write(messages[:i], True)
        if not until.startswith(prompt):  # a prompt that holds more than an answer has, e.g. an opened thought
            before, content = write(messages[:i], False), messages[i]["content"].strip()
            place = until.find(content, len(before)) if content and until.startswith(before) else -1
            prompt = until[:place] if place >= 0 else prompt
        if not (text.startswith(until) and until.startswith(prompt)):
            raise BadRow(
                f"the chat template writes turns 1 to {i + 1} differently once more turns follow, so that what is "
                "learnt cannot be placed: mark it with {% generation %} or choose another data.chat_template"
            )
        spans.append((len(prompt), len(until)))
    return spans


def _marked_spans(
    template: ChatTemplate, tokenizer: Any, messages: list[dict[str, Any]], conversation: Conversation
) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [messages], tools=list(conversation.tools) or None, chat_template=template.source,
        return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
    )  # fmt: skip
    spans = [(start, end) for start, end in rendered[1][0] if end > start]
    answers = [turn.learn for turn in conversation.turns if turn.role == "assistant"]
    if len(spans) != len(answers):
        raise BadRow(f"the chat template marks {len(spans)} of {len(answers)} answers with {{% generation %}}")
    return [span for span, learn in zip(spans, answers, strict=True) if learn]


def _without_tail(text: str, span: tuple[int, int], tokenizer: Any) -> tuple[int, int]:
    """The span without the white space that follows an end-of-turn token: nothing is generated after it."""
    start, end = span
    stripped = text[start:end].rstrip()
    if any(stripped.endswith(token) for token in tokenizer.added_tokens_encoder):
        end = start + len(stripped)
    return start, end


def _from_file(setting: str) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = Path(setting).expanduser()
    if not path.is_file():
        near = nearest(setting, [*BUILT_IN, "auto"])
        raise ConfigError(
            f"data.chat_template is {setting!r}: expected auto | {' | '.join(BUILT_IN)} | a file that exists{near}"
        )
    try:
        source = path.read_text("utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    except UnicodeDecodeError:
        raise ConfigError(f"data.chat_template: {path} is not UTF-8") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"data.chat_template: {path} does not parse at line {error.lineno}: {error.message}"
        ) from None
    if "messages" not in source:
        raise ConfigError(f"data.chat_template: {path} is no chat template: it never mentions `messages`")
    return source
