"""Tiny checkpoints of six blocks, one a family, with a tokenizer and rows to learn; and the jobs on them."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.data.config import DataConfig
from finetune.model.config import ModelConfig
from finetune.offsite.config import OffsiteConfig
from finetune.offsite.split import Job, split
from finetune.training.config import TrainConfig
from finetune.training.optimizers.adamw import AdamWConfig

torch.set_num_threads(1)
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe") for b in ("ra", "se", "ti", "vo", "zu")]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
BLOCKS, HEADS = 6, 4
FAMILIES = ("llama", "gpt2", "opt", "bloom", "mixtral")
COMMON = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
           "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def settings(family: str) -> Any:
    """A configuration of six blocks."""
    if family == "llama":
        return transformers.LlamaConfig(**COMMON, **DECODER)
    if family == "gpt2":
        return transformers.GPT2Config(**COMMON, n_embd=64, n_layer=BLOCKS, n_head=HEADS, n_positions=64)
    if family == "opt":
        return transformers.OPTConfig(**COMMON, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96,
                                      num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
                                      max_position_embeddings=64)  # fmt: skip
    if family == "bloom":
        return transformers.BloomConfig(**COMMON, hidden_size=64, n_layer=BLOCKS, n_head=HEADS)
    if family == "qwen2":
        return transformers.Qwen2Config(**COMMON, **DECODER, use_sliding_window=True, sliding_window=4,
                                        max_window_layers=2)  # fmt: skip
    return transformers.MixtralConfig(**COMMON, **DECODER, num_local_experts=4, num_experts_per_tok=2)


@functools.cache
def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms of ones and biases of zero would hide that they were left out, or kept
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "gate.weight" not in name:
                parameter.mul_(3)
    return model.to(torch.bfloat16).eval()


def checkpoint(directory: Path, family: str = "llama") -> Path:
    """A checkpoint in bfloat16."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    raw = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    _model(family).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def text_rows(path: Path, count: int = 24) -> Path:
    """Rows in which each word is followed by the one three further on."""
    lines = [" ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(12)) for start in range(count)]
    path.write_text("".join(json.dumps({"text": f"{line} {i % 7}"}) + "\n" for i, line in enumerate(lines)), "utf-8")
    return path


def job(base: Path, output: Path | None, *, data: Path | None = None, rate: float = 1e-2, **offsite: Any) -> Job:
    """A job on a checkpoint: plain layer drop to two of the middle's four blocks unless told otherwise."""
    chosen = {"layers": [1, 1], "keep": 2, "distill_steps": 0, "verbatim": True, **offsite}
    return Job(
        model=ModelConfig(path=str(base)),
        offsite=OffsiteConfig(output=None if output is None else str(output), **chosen),
        data=DataConfig(train=str(data), cache_dir=str(base / "cache"), packing=False),
        train=TrainConfig(learning_rate=rate, batch_size=4, log_every=100),
        optim=AdamWConfig(),
        device="cpu",
        output_dir=None if output is None else f"{output}-run",
    )


def emulator_of(base: Path, output: Path, **changes: Any) -> Path:
    """Split, and say where."""
    assert split(job(base, output, **changes)) == 0
    return output


def stock(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What stock transformers reads."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a directory."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def ids(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, len(VOCABULARY), (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ids(), use_cache=False).logits


def leaf(name: str, blocks: str) -> int | None:
    """The number of the block that a tensor of a file lies in; None outside the blocks."""
    parts = name.split(".")
    numbers = [int(part) for before, part in itertools.pairwise(parts) if before == blocks and part.isdigit()]
    return numbers[0] if numbers else None


def block_list(family: str) -> str:
    """What the family calls its list of blocks."""
    return "h" if family in ("gpt2", "bloom") else "layers"


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("cache"))
    return target
