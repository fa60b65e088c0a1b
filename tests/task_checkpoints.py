"""Tiny random checkpoints for tasks: encoders and decoders with and without heads, and a tokenizer that knows pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "awful", "dull"]
OTHERS = ["a", "the", "film", "plot", "was", "is", "and", "cast", "it", "not"]
WORDS = [*GOOD, *BAD, *OTHERS]
SPECIAL = ["<pad>", "<eos>", "[CLS]", "[SEP]", "<unk>"]


def tokenizer(encoder: bool) -> Any:
    """Words as tokens; an encoder's puts [CLS] and [SEP] around texts and tells the two of a pair apart."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    if encoder:
        raw.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if encoder else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_input_names=inputs
    )


def config(family: str, **changes: Any) -> Any:
    """Two layers of width 64, which bitsandbytes' own block kernels handle exactly."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.2,  # so that a random model has something to say
    }
    if family == "llama":
        sizes["num_key_value_heads"] = 2
    return getattr(transformers, {"bert": "BertConfig", "llama": "LlamaConfig"}[family])(**sizes | changes)


def write_base(directory: Path, family: str, model_class: str, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of a class of transformers, such as `BertModel` or `LlamaForSequenceClassification`."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config(family, **changes))
    model.save_pretrained(directory)
    tokenizer(encoder=family == "bert").save_pretrained(directory)
    return directory


def plain_base(directory: Path, family: str, **changes: Any) -> Path:
    """An encoder without any head, or a language model."""
    return write_base(directory, family, {"bert": "BertModel", "llama": "LlamaForCausalLM"}[family], **changes)


def rows(count: int, seed: int = 0, pairs: bool = False, number: bool = False) -> list[dict[str, Any]]:
    """Sentences of praise and blame; or as numbers, the share of praise among their words."""
    draw = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=draw))]

    made = []
    for index in range(count):
        praise = index % 2 == 0
        text = " ".join([pick(OTHERS), pick(OTHERS), pick(GOOD if praise else BAD), pick(OTHERS)][: 3 + index % 2])
        row: dict[str, Any] = {"text": text, "label": "good" if praise else "bad"}
        if pairs:
            row["text_pair"] = f"it {pick(GOOD if praise else BAD)}"
        if number:
            row["label"] = 1.5 if praise else -0.5
        made.append(row)
    return made
