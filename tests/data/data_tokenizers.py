"""Small tokenizers of every kind that masks have to be right for."""

from __future__ import annotations

from typing import Any

CORPUS = [
    "there was a little girl. She said: hello there!\n\nAnswer: yes, the cat sat on the mat.",
    "### Human: What is it?### Assistant: It is a cat.\nprint('hello')\n    return x + 1\n",
    "### Instruction:\nName the capital of France.\n\n### Response:\nParis is the capital of France.",
    "über naïve café 中文 текст 🙂 the end",
]
SPECIAL = ["<|end|>", "<|start|>", "<pad>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, bos: bool = False, trim_offsets: bool = False, pad_is_eos: bool = False) -> Any:
    """A byte-level BPE tokenizer like GPT-2's, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        start = ("<|start|>", backend.token_to_id("<|start|>"))
        steps.append(processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start]))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>" if bos else None,
        pad_token="<|end|>" if pad_is_eos else "<pad>",
    )  # fmt: skip


def space_at_end() -> Any:
    """Tokens that carry the space at their end and span words, no byte tokens: unknown characters are passed over."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("h", "e"), ("he", "▁"), ("c", "a"), ("ca", "t"), ("t", "he▁"), ("the▁", "cat"), (":", "▁"), ("a", "a")]
    pieces = ["<unk>", *SPECIAL, "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?#\n'"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", vocab["<|start|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>", pad_token="<|end|>", unk_token="<unk>"
    )


KINDS = {
    "byte_level": lambda: byte_level(),
    "byte_level_bos": lambda: byte_level(bos=True),
    "byte_level_trimmed_pad_is_eos": lambda: byte_level(trim_offsets=True, pad_is_eos=True),
    "space_at_end": space_at_end,
}
