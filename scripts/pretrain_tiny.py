"""Make the embedded base: train a byte-level tokenizer and a small Llama on text of the running CPython.

    python scripts/pretrain_tiny.py --minutes 40      # rewrites finetune/assets/tiny and the result file

The text is the language reference in `pydoc_data.topics`, and the sources and docstrings of the standard
library, less all that the evaluation rows of `data=pydocs` ask for. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from ngram import NGram  # noqa: E402

from finetune.assets import EMBEDDED  # noqa: E402
from finetune.data.pydocs import pretraining_sources, pydocs_rows, spells_out  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "pretrain_tiny.json"
VOCAB_SIZE, CONTEXT, EOS, PAD = 4096, 512, "<|endoftext|>", "<|pad|>"
HELD_OUT_PERCENT = 2
# Tables of code points and opcodes, not text anybody reads; the topics come as prose of their own.
TABLES = ("encodings.", "html.entities", "pydoc_data.topics", "pickletools", "stringprep")
TOKENS_PER_STEP = 4096
WARM_UP, DECAY, LONG = 0.02, 0.35, 0.15  # fractions of the time budget: first, last, and last at full context

# Ordinary words only, so that the frozen embeddings of a fine-tuned model have all been trained. "Answer:" ends
# without the blank, which byte-level tokens carry at their front, so the blank belongs to what is generated.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if message.role == 'system' -%}{{ text(message.content) | trim }}
{%- elif message.role == 'user' -%}{{ 'Question: ' + text(message.content) | trim }}
{%- elif message.role == 'assistant' -%}
{{- 'Answer:' }}{% generation %}{{ ' ' + text(message.content) | trim + eos_token }}{% endgeneration %}
{%- else -%}{{ raise_exception("expected role system, user or assistant, not '" + message.role + "'") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\nAnswer:' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Corpus:
    """Token streams of the training and the held-out documents, each document between end-of-text tokens."""

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


def documents() -> Iterator[tuple[str, str]]:
    """Yield (key, text): sources and docstrings under their module's name, topics under their own."""
    for source in pretraining_sources():
        if source.module.startswith(TABLES):
            continue
        yield source.module, source.text
        if source.docstrings:
            yield source.module, "\n\n".join(source.docstrings) + "\n"
    answers = [row["messages"][1]["content"] for row in pydocs_rows("eval")]
    for topic, text in sorted(topics.items()):
        if not spells_out(text, answers):
            yield f"topic {topic}", text


def is_held_out(key: str) -> bool:
    """Say whether a document is kept for measuring: by hash, a module's source together with its docstrings."""
    return int.from_bytes(hashlib.sha256(f"held out {key}".encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer: all 256 bytes are tokens, so that no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(directory: Path = EMBEDDED) -> Tokenizer:
    """Return the tokenizer of a finished base."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def tokenize_corpus(texts: Iterator[tuple[str, str]] | list[tuple[str, str]], tokenizer: Tokenizer) -> Corpus:
    """Return both token streams; training documents are in an order of their hashes, not of the alphabet."""
    texts = sorted(texts, key=lambda item: hashlib.sha256(item[1].encode()).digest())
    eos = tokenizer.token_to_id(EOS)

    def stream(held_out: bool) -> tuple[np.ndarray, int]:
        chosen = [text for key, text in texts if is_held_out(key) == held_out]
        ids = [eos]
        for encoding in tokenizer.encode_batch(chosen):
            ids += [*encoding.ids, eos]
        return np.array(ids, dtype=np.uint16), sum(len(text.encode()) for text in chosen)

    held_out, held_out_bytes = stream(True)
    return Corpus(stream(False)[0], held_out, held_out_bytes)


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: 5.4 M parameters, every width a multiple of 64."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # GPT-2's rule: the residual stream keeps its size
            weight.data.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def batches(tokens: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield [TOKENS_PER_STEP / length, length + 1] windows in random order, without end, shifted anew every epoch."""
    rows = TOKENS_PER_STEP // length
    while True:
        starts = np.arange(rng.integers(length), len(tokens) - length, length)
        rng.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            index = starts[first : first + rows, None] + np.arange(length + 1)
            yield torch.from_numpy(tokens[index].astype(np.int64))


def loss_sum(model: torch.nn.Module, window_BS: torch.Tensor) -> torch.Tensor:
    """Return the sum of next-token losses in nats, in bf16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BSV = model(input_ids=window_BS[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1).float(), window_BS[:, 1:].flatten(), reduction="sum"
    )


@torch.no_grad()
def held_out_nats(model: torch.nn.Module, tokens: np.ndarray) -> float:
    """Return the total loss in nats of every token but the first, each scored once, in windows of CONTEXT."""
    model.eval()
    ids, starts = torch.from_numpy(tokens.astype(np.int64)), range(0, len(tokens) - 1, CONTEXT)
    windows = [ids[start : start + CONTEXT + 1] for start in starts]
    full = [window for window in windows if len(window) == CONTEXT + 1]
    total = sum(float(loss_sum(model, torch.stack(full[i : i + 8]))) for i in range(0, len(full), 8))
    total += sum(float(loss_sum(model, window[None])) for window in windows if len(window) <= CONTEXT)
    model.train()
    return total


def rate(progress: float) -> float:
    """Return the learning rate's factor at a fraction of the time budget: warm-up, plateau, linear decay to zero."""
    return max(0.0, min(1.0, progress / WARM_UP + 0.01, (1 - progress) / DECAY))


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, and AdamW for the embeddings and norms.

    Muon (Jordan et al. 2024) takes fewer tokens to the same loss; its updates are scaled to AdamW's root mean
    square (Liu et al. 2025, section 2.2), so that one learning rate serves both.
    """
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    chosen = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(inner, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=0.0, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0, fused=True),
    ]


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a stock Hugging Face checkpoint in bf16; each file appears whole."""
    part = directory.with_name(directory.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    small = copy.deepcopy(model).to(torch.bfloat16)
    small.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    small.save_pretrained(part)
    tokenizer.save(str(part / "tokenizer.json"))
    (part / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (part / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(file, directory / file.name)
    shutil.rmtree(part)


def read_curve(log: Path) -> list[dict[str, float]]:
    """Return the curve that an interrupted run printed."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"step"')]


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Train for the time budget, write a checkpoint now and then, and return the curve."""
    optimizers = make_optimizers(model)
    run = torch.compile(model, dynamic=False) if options.compile else model
    probe = corpus.held_out[: 32 * CONTEXT + 1]
    probe_bytes = corpus.held_out_bytes * (len(probe) - 1) / (len(corpus.held_out) - 1)  # an estimate, for the curve
    curve = read_curve(options.resume) if options.resume else []
    done = first = int(curve[-1]["step"]) if curve else 0
    rng = np.random.default_rng([options.seed, done])
    streams = {length: batches(corpus.train, length, rng) for length in (CONTEXT // 2, CONTEXT)}
    for stream in streams.values() if options.compile else ():  # compile before the clock starts
        loss_sum(run, next(stream)).backward()
        model.zero_grad()
    recent, saved, logged = [], time.monotonic(), time.monotonic()
    begun = saved - (curve[-1]["seconds"] if curve else 0)
    while (progress := (time.monotonic() - begun) / (60 * options.minutes)) < 1:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = options.learning_rate * rate(progress) * min(1.0, (done - first + 1) / 20)
        loss = loss_sum(run, next(streams[CONTEXT if progress > 1 - LONG else CONTEXT // 2])) / TOKENS_PER_STEP
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        recent.append(float(loss.detach()))
        now = time.monotonic()
        if now - logged > options.log_every:
            line = {
                "step": done,
                "seconds": round(now - begun),
                "tokens": done * TOKENS_PER_STEP,
                "learning_rate": round(optimizers[0].param_groups[0]["lr"], 6),
                "loss": round(float(np.mean(recent)), 4),
                "tokens_per_second": round(len(recent) * TOKENS_PER_STEP / (now - logged)),
                "held_out_bits_per_byte": round(held_out_nats(model, probe) / math.log(2) / probe_bytes, 4),
            }
            curve.append(line)
            print(json.dumps(line), flush=True)
            recent, logged = [], time.monotonic()
        if now - saved > 60 * options.save_every:
            save(model, tokenizer, options.out)
            saved = now
    return curve


def machine() -> str:
    """Return the processor's name and the number of cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def report(corpus: Corpus, curve: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the checkpoint on disk and the 5-gram on the same held-out tokens; return the result file's content."""
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    nats = held_out_nats(model, corpus.held_out)
    bits = NGram(corpus.train, VOCAB_SIZE).bits(corpus.held_out)
    scored = len(corpus.held_out) - 1
    return {
        "format_version": 1,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(["python scripts/pretrain_tiny.py", *sys.argv[1:]]),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "corpus_tokens": len(corpus.train),
        "trained_tokens": curve[-1]["tokens"] if curve else 0,
        "seconds": curve[-1]["seconds"] if curve else 0,
        "held_out": {"bytes": corpus.held_out_bytes, "tokens": scored},
        "bits_per_byte": {
            "model": round(nats / math.log(2) / corpus.held_out_bytes, 4),
            "5-gram": round(bits / corpus.held_out_bytes, 4),
        },
        "held_out_loss_nats_per_token": {
            "model": round(nats / scored, 4),
            "5-gram": round(bits * math.log(2) / scored, 4),
        },
        "curve": curve,
    }


def main() -> None:
    """Read the command line, train, and write the checkpoint and the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40, help="time budget of training (default 40)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default 0)")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="checkpoint directory (default the embedded base)")
    parser.add_argument("--result", type=Path, default=RESULT, help="result file (default %(default)s)")
    parser.add_argument("--log-every", type=float, default=60, help="seconds between lines of the curve (default 60)")
    parser.add_argument("--save-every", type=float, default=6, help="minutes between checkpoints (default 6)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--resume", type=Path, help="continue from --out; the file holds what the first run printed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = list(documents())
    if options.resume:
        tokenizer = load_tokenizer(options.out)
    else:
        tokenizer = train_tokenizer([text for key, text in texts if not is_held_out(key)])
    corpus = tokenize_corpus(texts, tokenizer)
    size = sum(len(text.encode()) for _, text in texts)
    print(f"{len(texts)} documents, {size} bytes, {len(corpus.train)} + {len(corpus.held_out)} tokens", flush=True)
    model = build_model()
    if options.resume:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).state_dict())
    curve = train(model, tokenizer, corpus, options)
    save(model, tokenizer, options.out)
    result = report(corpus, curve, options)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in result.items() if key != "curve"}, indent=1)
    points = ",\n".join(f"  {json.dumps(point)}" for point in curve)
    options.result.write_text(f'{head[:-2]},\n "curve": [\n{points}\n ]\n}}\n')
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}))


if __name__ == "__main__":
    main()
