"""What a checkpoint holds: with which of transformers' heads it is opened so that each of its tensors has a place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.model.task import Task

OPENERS = (
    ("seq2seq", "AutoModelForSeq2SeqLM"),
    ("classification", "AutoModelForSequenceClassification"),
    ("encoder", "AutoModelForMaskedLM"),
    ("causal_lm", "AutoModelForCausalLM"),
    ("encoder", "AutoModelForPreTraining"),
    ("encoder", "AutoModelForTokenClassification"),
    ("encoder", "AutoModelForQuestionAnswering"),
    ("encoder", "AutoModel"),
)
"""What a model gives, and the class of transformers that opens such models."""
MORE = "AutoModelForPreTraining"
"""Opens what a checkpoint may hold beside the class that it names: BERT's own has a pooler and a second head."""
WORDS = {
    "causal_lm": "causal language model",
    "seq2seq": "sequence-to-sequence model",
    "classification": "sequence classifier",
    "regression": "sequence regressor",
    "encoder": "encoder",
}


@dataclass(frozen=True)
class Held(Task):
    """A checkpoint opened as what it is, whatever it is to be trained for later; no head is new and none left out.

    Attributes:
        kind: causal_lm | seq2seq | classification | regression, by what the model gives; encoder where that is
            neither tokens to come nor one answer a row.
        labels: names of the classes of a classification.
        opener: the class of transformers that opens it.
    """

    opener: str = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        """Nothing is asked of a checkpoint's own classes."""

    @property
    def words(self) -> str:
        return WORDS[self.kind]

    @property
    def judges_rows(self) -> bool:
        """False: its head is used as it is, where a `Task` might need a new one."""
        return False

    @property
    def reads_rows(self) -> bool:
        """Whether it is given rows each by itself; texts behind one another are for what writes on."""
        return self.kind != "causal_lm"

    def auto_class(self) -> Any:
        import transformers

        return getattr(transformers, self.opener)


def candidates(config: Any) -> list[Held]:
    """How a checkpoint may be opened, the likeliest way first.

    That is the class that config.json names, then the one with more heads than that; any where it names none that
    transformers knows.

    Args:
        config: as transformers reads it.
    """
    import transformers

    found = []
    for kind, opener in OPENERS:
        native = getattr(transformers, opener)._model_mapping.get(type(config), None)
        if native is not None:
            found.append((_held(kind, opener, config), native.__name__))
    told = config.architectures or ()
    named = [held for held, name in found if name in told]
    more = [held for held, name in found if held.opener == MORE and name not in told]
    return [*named[:1], *more] if named else [held for held, _ in found] or [Held()]


def _held(kind: str, opener: str, config: Any) -> Held:
    """With the classes of a classifier; one of several labels at a time gives neither classes nor a number."""
    if kind != "classification":
        return Held(kind, opener=opener)
    labels = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    if config.problem_type == "multi_label_classification":
        return Held("encoder", opener=opener)
    return Held(kind, labels, opener) if len(labels) > 1 else Held("regression", opener=opener)
