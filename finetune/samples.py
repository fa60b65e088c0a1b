"""What the model says before and after, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers to prompts that are rendered and tokenized already.

    Prompts run one by one: a left-padded batch would be faster, but its low bits depend on the padding, and what a user
    compares should not.

    Args:
        model: a transformers causal LM, or an encoder and a decoder, adapted or not.
        tokenizer: its tokenizer.
        prompts: token ids as they are fed, with whatever the chat template and the tokenizer put around the text.
        max_new_tokens: the longest answer, in tokens.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        begins = 1 if model.config.is_encoder_decoder else ids.shape[1]  # type: ignore[union-attr]
        answers.append(tokenizer.decode(out[0, begins:], skip_special_tokens=True).strip())
    model.train(was_training)
    return answers


@torch.no_grad()
def verdicts(model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
    """What a model that judges rows says of some: the likeliest class and its probability, or the number.

    Args:
        model: of transformers, with a head for sequence classification.
        rows: token ids and, where the model reads them, token types.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    said = []
    for ids, types in rows:
        inputs = {"input_ids": torch.tensor([list(ids)], device=device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if types:
            inputs["token_type_ids"] = torch.tensor([list(types)], device=device)
        logits_C = model(**inputs).logits[0].float()
        if len(logits_C) == 1:
            said.append(f"{float(logits_C[0]):.4g}")
            continue
        share, number = logits_C.softmax(-1).max(-1)
        said.append(f"{model.config.id2label[int(number)]} ({float(share):.0%})")  # type: ignore[union-attr, index]
    model.train(was_training)
    return said


def write_samples(path: Path, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Write samples.md: for each (prompt, reference, before, after) a section with the three answers."""
    parts = ["# Held-out prompts, answered before and after", ""]
    for prompt, reference, before, after in rows:
        parts += [
            _quoted("Prompt", prompt),
            _quoted("Reference", reference),
            _quoted("Before", before),
            _quoted("After", after),
            "---",
            "",
        ]
    path.write_text("\n".join(parts), "utf-8")


def _quoted(title: str, text: str) -> str:
    body = "\n".join(f"> {line}" for line in text.strip().splitlines()) or "> (nothing)"
    return f"**{title}**\n\n{body}\n"
