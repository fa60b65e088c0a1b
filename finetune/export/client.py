"""Start `proof_client.py` in an interpreter of its own and bring back what it says, or why it could not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("proof_client.py")
TIMEOUT_SECONDS = 3600
PROBE_TEXTS = ["The quick brown fox, 123.", "  two  spaces\n\tand a tab", "naïve — 中文 🙂"]
PROBE_CHATS = [
    [{"role": "user", "content": "What is a tuple?"}],
    [
        {"role": "user", "content": "What is a tuple?"},
        {"role": "assistant", "content": "An immutable sequence."},
        {"role": "user", "content": "And a list?"},
    ],
]


class ClientFailed(Exception):
    """The client crashed, was too slow, or did not answer: one line that says so."""


def ask(request: dict[str, Any], workspace: Path, timeout: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Run the client on a request.

    Args:
        request: what `proof_client.py` reads; `answer` is set here.
        workspace: an existing directory that receives the request, the client's output and its answer.
        timeout: seconds until it is killed.

    Returns:
        The content of `answer.json`; the observations lie beside it in `workspace / "answer"`.

    Raises:
        ClientFailed: with the last line the client wrote to stderr.
    """
    answer, log = workspace / "answer", workspace / "stderr.txt"
    answer.mkdir()
    path = workspace / "request.json"
    path.write_text(json.dumps(request | {"answer": str(answer)}), "utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", str(SCRIPT), str(path)]
    with log.open("wb") as stderr:
        try:
            done = subprocess.run(
                command,
                env=os.environ | offline | quiet,
                cwd=workspace,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ClientFailed(f"the proof client was still running after {timeout:g} s and was stopped") from None
    if done.returncode:
        raise ClientFailed(f"the proof client could not use it ({_last_words(log, done.returncode)})")
    try:
        return json.loads((answer / "answer.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ClientFailed(f"the proof client left no answer: {error}") from None


def probe(tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer in memory makes of the probe texts and conversations; the export's own has to make the same.

    A chat template that refuses a probe conversation (some insist on a system message) is asked without conversations.
    """
    chats: list[list[int]] | None = None
    asked: list[list[dict[str, str]]] = []
    if tokenizer.chat_template:
        from jinja2.exceptions import TemplateError

        chats = []
        for chat in PROBE_CHATS:
            try:
                rendered = [
                    tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=prompt)
                    for prompt in (False, True)
                ]
            except TemplateError:
                continue
            asked.append(chat)
            chats += rendered
    return {
        "asked": asked,
        "texts": [tokenizer.encode(text) for text in PROBE_TEXTS],
        "chats": chats,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "vocabulary": len(tokenizer),
    }


def _last_words(log: Path, code: int) -> str:
    """The last line of stderr that says something, else the exit code or signal."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return lines[-1][:500] if lines else ending
