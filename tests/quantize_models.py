"""Tiny random checkpoints for `finetune quantize`, text to calibrate them with, and the verb as the tests call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENIZER = Path(__file__).parents[1] / "finetune" / "assets" / "tiny"
WORDS = "the import statement returns a list of names that this method is called with when it reads a file".split()


def tokenizer() -> Any:
    """The embedded model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def config(family: str, size: int, **changes: Any) -> Any:
    """A configuration of two blocks.

    Args:
        size: of the vocabulary.
        changes: to it, in the family's own names.
    """
    import transformers

    llama: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", llama),
        "mixtral": ("Mixtral", {**llama, "num_local_experts": 3, "num_experts_per_tok": 2}),
        "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        "opt": (
            "OPT",
            {
                "hidden_size": 64,
                "ffn_dim": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 128,
                "word_embed_proj_dim": 64,
            },
        ),
    }
    name, settings = families[family]
    return getattr(transformers, f"{name}Config")(vocab_size=size, **{**settings, **changes})


def save(
    directory: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[Any], None] = lambda model: None,
    **changes: Any,
) -> Path:
    """A checkpoint with its tokenizer; matrices have a standard deviation of 0.1.

    Args:
        change: called with the model before it is saved.
        changes: as of `config`.
    """
    from transformers import AutoModelForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, len(words), **changes)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def text(path: Path, rows: int = 30, words: int = 60) -> Path:
    """A JSONL file of rows of random words."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(WORDS), (rows, words), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(WORDS[place] for place in row)}) for row in drawn]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def arguments(base: Path | str, calibration: Path | None, output: Path, *overrides: str) -> list[str]:
    """Of the verb; with text in rows of 64 tokens."""
    rows = [] if calibration is None else [f"data.calibration={calibration}", "data.max_length=64"]
    return [f"model.path={base}", f"output={output}", "device=cpu", *rows, *overrides]


def run(base: Path | str, calibration: Path | None, output: Path, *overrides: str) -> dict[str, Any]:
    """Quantize and give back the report that lies in the checkpoint."""
    from finetune.cli import quantize

    assert quantize(arguments(base, calibration, output, *overrides)) == 0
    return json.loads((output / "quantization.json").read_text("utf-8"))


def logits(model: Any) -> Tensor:
    """Of two rows of tokens, float32."""
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 72).reshape(2, 16), use_cache=False).logits.float()
