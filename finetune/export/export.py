"""All exports of a run: write each format, prove it, publish it with its proof."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.data.rows import TokenRows
from finetune.errors import UserError
from finetune.export.base import ExportSource, Format, Proof, Written, has_own_code
from finetune.export.client import PROBE_TEXTS, ClientFailed, ask, probe
from finetune.export.config import ExportConfig
from finetune.export.directory import TEMPORARY, published, sweep, write_json
from finetune.export.formats import chosen
from finetune.export.formats.safetensors import write as write_dense
from finetune.export.verify import Panel, Reference, compare, fill, judge, reference_of
from finetune.model.headers import StoredTensor, read_header
from finetune.model.task import AUTO_CLASSES

PROMPT_TOKENS, NEW_TOKENS = 32, 8
ROW_COST = 4096
"""Logits of a position that a row's memory is reckoned in where the model gives one answer a row."""


@dataclass(frozen=True)
class Trial:
    """What every format of one export is proven against."""

    source: ExportSource
    config: ExportConfig
    panel: Panel
    reference: Reference
    facts: dict[str, Any]


def export(source: ExportSource, out: Path, config: ExportConfig, eval_rows: TokenRows, pad_id: int) -> list[Proof]:
    """Write every format of `config.formats` to `out/<format>/`, each with its proof in `export.json`.

    A format that cannot be written, opened or that fails its gate is a proof that did not pass; the others stand.

    Args:
        source: the adapted model and what belongs to it; it is left as it was, bit for bit.
        out: created where missing; must be this process's alone.
        eval_rows: held-out rows; at most `config.rows` of them are used.
        pad_id: token that fills up short rows.

    Raises:
        ConfigError: when a format has no such name, before anything is written.
    """
    formats = chosen(config.formats)
    if not formats:
        return []
    out = out.resolve()  # the client runs in a directory of its own
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=TEMPORARY) as workspace:
        head = None if source.task.judges_rows else source.model.get_output_embeddings()
        vocabulary = ROW_COST if head is None else int(head.weight.shape[0])
        panel = Panel.of(eval_rows, config.rows, vocabulary, pad_id)
        panel.save(Path(workspace) / "rows.safetensors")
        reference = reference_of(source, panel, Path(workspace) / "reference")
        trial = Trial(source, config, panel, reference, probe(source.tokenizer))
        return [_publish(trial, form, out, Path(workspace)) for form in formats]


def _publish(trial: Trial, form: Format, out: Path, workspace: Path) -> Proof:
    """Write, prove and publish one format; a failure becomes the proof's reason."""
    runtime = form.runtime.replace(AUTO_CLASSES["causal_lm"], AUTO_CLASSES[trial.source.task.kind])
    proof = Proof(format=form.name, runtime=runtime)
    adapter = trial.source.adapter
    with published(out / form.name) as directory:
        try:
            if form.needs_merge and adapter is not None and not adapter.mergeable:
                raise UserError(f"adapter {adapter.config.name} cannot be merged: export peft instead")
            if not trial.panel.plan:
                raise UserError("no held-out row has a token to learn, so nothing can be proven: give data.eval")
            written = form.write(trial.source, directory)
            _prove(trial, form, written, directory, workspace / form.name, proof)
        except (UserError, ClientFailed, OSError) as error:
            proof.passed, proof.reason = False, " ".join(str(error).split())
        write_json(directory / "export.json", proof.to_dict())
    return proof


def _prove(trial: Trial, form: Format, written: Written, directory: Path, workspace: Path, proof: Proof) -> None:
    """Open the artefact in its runtime and fill in the proof."""
    workspace.mkdir()
    proof.bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    stored = stored_tensors(directory)
    proof.bits_per_weight = 8 * sum(tensor.end - tensor.start for tensor in stored) / written.weights
    model = trial.source.model
    request = {
        "loader": form.loader,
        "auto_class": AUTO_CLASSES[trial.source.task.kind],
        "head": head_settings(trial.source),
        "directory": str(directory),
        **_base(trial.source, written, workspace),
        "rows": str(workspace.parent / "rows.safetensors"),
        "plan": trial.panel.plan,
        "stride": trial.panel.stride,
        "pad_id": trial.panel.pad_id,
        "texts": PROBE_TEXTS,
        "chats": trial.facts["asked"],
        "prompt": trial.panel.rows[0].input_ids[:PROMPT_TOKENS].tolist(),
        "new_tokens": NEW_TOKENS,
        "trust_remote_code": has_own_code(model),
    }
    with parked(model) as placement:
        answer = ask(request | placement, workspace)
    losses, divergence = compare(trial.panel, trial.reference, workspace / "answer")
    fill(proof, trial.reference, losses, divergence)
    judge(proof, trial.config, form)
    complaint = unlike(trial, answer) or (form.check(written, stored) if form.check is not None else None)
    if complaint:
        proof.passed, proof.reason = False, complaint


def _base(source: ExportSource, written: Written, workspace: Path) -> dict[str, Any]:
    """Which base the client puts an adapter on, and how it quantizes it."""
    if not written.decode_base:
        mapping = dict(source.key_mapping) or None
        return {"base": written.base, "base_quantization": written.base_quantization, "key_mapping": mapping}
    decoded = workspace / "base"
    decoded.mkdir()
    with source.adapter.disabled() if source.adapter is not None else contextlib.nullcontext():
        write_dense(replace(source, adapter=None, dtype=torch.float32), decoded)
    return {"base": str(decoded), "base_quantization": None}


def head_settings(source: ExportSource) -> dict[str, Any]:
    """What a user tells transformers of the head where a base has none; empty for tokens."""
    if not source.task.judges_rows:
        return {}
    config = source.model.config
    keys = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
    return {key: getattr(config, key) for key in keys}


def stored_tensors(directory: Path) -> list[StoredTensor]:
    """Name, dtype, shape and place of every tensor in the safetensors files of a directory."""
    return [tensor for path in sorted(directory.glob("*.safetensors")) for tensor in read_header(path).tensors]


def unlike(trial: Trial, answer: dict[str, Any]) -> str | None:
    """A complaint where the artefact's tokenizer or its stop tokens are not those that were trained with."""
    facts = trial.facts
    for key in ("texts", "chats", "eos", "pad", "vocabulary"):
        if answer[key] != facts[key]:
            return f"its tokenizer is not the one trained with: {key} {_short(answer[key])}, not {_short(facts[key])}"
    if trial.source.task.judges_rows:
        named = list(trial.source.model.config.id2label.values())
        return None if answer["classes"] == named else f"its classes are {answer['classes']}, not {named}"
    generation = getattr(trial.source.model, "generation_config", None)
    expected = getattr(generation, "eos_token_id", None)
    if answer["generation_eos"] != expected:
        return f"its generation stops at token {answer['generation_eos']}, the base's at {expected}"
    if not answer["continuation"]:
        return "greedy generation made no token"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def parked(model: Any) -> Iterator[dict[str, Any]]:
    """Clear the accelerator for the client, and say on which device and in which dtype it should compute.

    On a CPU the client computes in float32, like the reference. On an accelerator the model waits in host memory
    meanwhile, and the client uses the accelerator in the model's own dtype.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        yield {"device": "cpu", "dtype": "auto", "widen": True}
        return
    dtype = str(model.dtype).removeprefix("torch.")
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield {"device": str(device), "dtype": dtype, "widen": False}
    finally:
        model.to(device)


def proof_table(proofs: list[Proof]) -> str:
    """The proofs as a text table, one line a format; the reasons of those that failed stand below it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = ("format", "MB", "bits/weight", "KL mean", "KL p99", "same top token", "loss: base", "trained", "export")
    for column in (*columns, "retained", "proof"):
        table.add_column(column, justify="left" if column in ("format", "proof") else "right", no_wrap=True)
    for proof in proofs:
        table.add_row(
            proof.format,
            f"{proof.bytes / 1e6:.1f}",
            _number(proof.bits_per_weight, ".2f"),
            _number(proof.kl_mean, ".2g"),
            _number(proof.kl_p99, ".2g"),
            _number(proof.top1_agreement, ".1%"),
            _number(proof.loss_base, ".4f"),
            _number(proof.loss_trained, ".4f"),
            _number(proof.loss_export, ".4f"),
            _number(proof.retained, ".4f"),
            "passed" if proof.passed else "FAILED",
        )
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    reasons = [f"{proof.format}: {proof.reason}" for proof in proofs if not proof.passed]
    return "\n".join([*(line.rstrip() for line in text.getvalue().strip("\n").splitlines()), *reasons])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
