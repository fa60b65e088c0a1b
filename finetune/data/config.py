"""Where rows come from and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.data.columns import check_columns, template_fields
from finetune.errors import ConfigError, nearest

FORMATS = ("auto", "text", "alpaca", "prompt_completion", "messages", "sharegpt", "labelled")
TOO_LONG = ("truncate", "drop", "split", "error")


@dataclass
class DataConfig:
    """The rows to learn from.

    Attributes:
        train: a file, a directory, a hub dataset id (`owner/name`, `owner/name:split`, `owner/name:config:split`),
            `pydocs` (the interpreter's own documentation), a list of these, or a mapping of these to weights: how
            often each row is seen in an epoch ({a.jsonl: 2.0, b.jsonl: 0.5}). From Python also a list of rows.
        eval: the same for the held-out rows; null holds out 2 % of train by a hash of the row (16 to 500 rows).
        format: auto | text | alpaca | prompt_completion | messages | sharegpt | labelled (rows of a text and a label,
            for objective=classification and objective=regression).
        columns: renames, field -> column of the file, e.g. {prompt: question, completion: answer}.
        template: the prompt over the row's columns, e.g. "Q: {question}\\nA:", followed by the field `completion`, as
            plain text without a chat template; with format=text it is the whole text, with format=labelled the text
            that is judged.
        chat_template: auto | guanaco | alpaca | chatml | a file with a Jinja template.
        max_length: tokens a row; null is min(the model's context, 2048).
        too_long: what happens to longer rows: truncate | drop | split | error; counted and shown.
        packing: put several rows into one sequence, attention kept apart.
        max_bad_fraction: share of faulty rows that is tolerated, counted and shown, in [0, 1].
        cache_dir: where tokenized rows are cached by digest; null is the user's cache directory.
    """

    train: Any = "pydocs"
    eval: Any = None
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    chat_template: str = "auto"
    max_length: int | None = None
    too_long: str = "truncate"
    packing: bool = False
    max_bad_fraction: float = 0.01
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.train is None or self.train == "" or self.train == [] or self.train == {}:
            raise ConfigError("data.train is empty: expected a file, a directory, a hub dataset id or `pydocs`")
        for key, value, choices in (("format", self.format, FORMATS), ("too_long", self.too_long, TOO_LONG)):
            if value not in choices:
                raise ConfigError(f"data.{key} is {value!r}: expected {' | '.join(choices)}{nearest(value, choices)}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"data.max_length is {self.max_length}: expected at least 2 tokens, or null")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {self.max_bad_fraction}: expected a share between 0 and 1")
        check_columns(self.columns)
        if self.template is not None:
            template_fields(self.template)
            if self.format not in ("auto", "prompt_completion", "text", "labelled"):
                raise ConfigError(
                    f"data.template conflicts with data.format={self.format}: a template writes the prompt of "
                    "prompt_completion rows, or with data.format=text the whole text"
                )
