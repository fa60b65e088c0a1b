"""What an export has to show: predictions near the unmerged model's, and the fine-tuning kept.

The reference is the model in memory, unmerged and without dropout. The export is opened by `proof_client.py` in a fresh
interpreter that cannot import finetune, on the same held-out token ids. Both write log-probabilities to disk batch by
batch, so that neither process holds more than a batch. KL is exact, over the whole vocabulary, at every `stride`-th
learnt position; the stride is 1 until the log-probabilities of one side would take more than `LOG_PROBS_BYTES`, and
then picks a sample evenly spaced over all positions (its size is in export.json as kl_tokens). Losses run over all.

Shape suffixes: P learnt positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Batch, Row, TokenRows
from finetune.evaluation import Divergence, NormalDivergence, RowLosses, predictions
from finetune.export.base import ExportSource, Format, Proof
from finetune.export.config import ExportConfig

LOG_PROBS_BYTES = 256 * 10**6
"""Disk that the log-probabilities of one side of a comparison may take."""
LOGITS_ELEMENTS = 1 << 24
"""Logits of one batch, padding included: 64 MiB in float32, unless one row alone has more."""


@dataclass(frozen=True)
class Panel:
    """The held-out rows of a proof, and how they are batched, the same for both sides.

    Attributes:
        rows: those with something to learn, shortest first.
        plan: for each batch the indices of its rows.
        stride: every how many learnt positions log-probabilities are compared.
        pad_id: fills up short rows.
    """

    rows: TokenRows
    plan: list[list[int]]
    stride: int
    pad_id: int

    @classmethod
    def of(cls, rows: TokenRows, limit: int, vocabulary: int, pad_id: int) -> Panel:
        """Choose at most `limit` rows, evenly spaced over those with something to learn."""
        learnt = [index for index, row in enumerate(rows) if learnt_positions(row)]
        picked = {learnt[int(i)] for i in np.linspace(0, len(learnt) - 1, min(limit, len(learnt))).round()}
        lengths = rows.lengths()
        order = sorted(sorted(picked), key=lambda index: int(lengths[index]))
        kept = TokenRows.of([rows[index] for index in order])
        plan: list[list[int]] = []
        for index, length in enumerate(kept.lengths().tolist()):
            if plan and (len(plan[-1]) + 1) * length * vocabulary <= LOGITS_ELEMENTS:
                plan[-1].append(index)
            else:
                plan.append([index])
        positions = sum(learnt_positions(row) for row in kept)
        stride = max(1, math.ceil(positions * vocabulary * 4 / LOG_PROBS_BYTES))
        return cls(kept, plan, stride, pad_id)

    def batches(self) -> Iterator[Batch]:
        """The batches of the plan."""
        return (collate(self.rows, [[row] for row in batch], self.pad_id) for batch in self.plan)

    def save(self, path: Path) -> None:
        """Write the rows for the proof client."""
        arrays = {"input_ids": self.rows.input_ids, "labels": self.rows.labels, "offsets": self.rows.offsets}
        tensors = {name: torch.from_numpy(array).long() for name, array in arrays.items()}
        if self.rows.targets is not None:
            tensors["targets"] = torch.from_numpy(self.rows.targets)
        if self.rows.token_types is not None:
            tensors["token_types"] = torch.from_numpy(self.rows.token_types).long()
        if self.rows.sources is not None:
            tensors["sources"] = torch.from_numpy(self.rows.sources).long()
        save_file(tensors, path)

    def divergence(self) -> Divergence:
        """What measures how far two models are from each other on these rows."""
        targets = self.rows.targets
        if targets is None or targets.dtype.kind != "f":
            return Divergence()
        return NormalDivergence(variance=float(targets.astype(np.float64).var()) or 1.0)


def learnt_positions(row: Row) -> int:
    """How many predictions of a row are measured: one where it has a target of its own."""
    return 1 if row.target is not None else int((row.labels[1:] != IGNORE).sum())


@dataclass
class Reference:
    """What the model in memory predicts on the panel.

    Attributes:
        base, trained: its losses without and with the adapter.
        directory: where its log-probabilities lie, one safetensors file a batch, strided like the client's.
    """

    directory: Path
    base: RowLosses = field(default_factory=RowLosses)
    trained: RowLosses = field(default_factory=RowLosses)


@contextlib.contextmanager
def still(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it the model is in evaluation mode and its unquantized weights are in `dtype`; after it, all is as before.

    A 16-bit weight is widened in place and narrowed back, which is exact, so no second copy is kept.

    Args:
        dtype: a wider floating dtype, or None to leave the weights alone.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = {parameter: parameter.dtype for parameter in model.parameters()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    # Modules that decode or cast on the fly remember in an attribute which dtype they compute in.
    remembered = {module: _dtypes_of(module) for module in model.modules()}
    model.eval()
    try:
        if dtype is not None:
            model.to(dtype)
            for module, attributes in remembered.items():
                vars(module).update(dict.fromkeys(attributes, dtype))
        yield
    finally:
        for parameter, before in parameters.items():
            if parameter.dtype != before:
                parameter.data = parameter.data.to(before)
        for module, kept in buffers.items():
            module._buffers.update(kept)
            vars(module).update(remembered[module])
            module.training = modes[module]


def _dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """The attributes of a module that name a floating dtype."""
    return {k: v for k, v in vars(module).items() if isinstance(v, torch.dtype) and v.is_floating_point}


def reference_of(source: ExportSource, panel: Panel, directory: Path) -> Reference:
    """Measure the unmerged model with and without its adapter; on a CPU in float32, else in its own dtype."""
    reference = Reference(directory)
    directory.mkdir()
    device = next(source.model.parameters()).device
    with still(source.model, torch.float32 if device.type == "cpu" else None):
        seen = 0
        for number, batch in enumerate(panel.batches()):
            parts = list(predictions(source.model, [batch], device))
            rows_before = len(reference.trained.sums)
            kept: list[Tensor] = []
            for part in parts:
                reference.trained.add(part.losses_P(), part.rows_P + rows_before)
                index_P = torch.arange(seen, seen + len(part.targets_P))
                kept.append(part.log_probs_PV[(index_P % panel.stride == 0).to(device)].cpu())
                seen += len(part.targets_P)
            save_file({"log_probs": torch.cat(kept)}, directory / f"batch-{number:05d}.safetensors")
        if source.adapter is None:
            reference.base = reference.trained
        else:
            with source.adapter.disabled():
                for part in predictions(source.model, panel.batches(), device):
                    reference.base.add(part.losses_P(), part.rows_P)
    return reference


def compare(panel: Panel, reference: Reference, answer: Path) -> tuple[RowLosses, Divergence]:
    """The export's losses, and its divergence from the reference, from what the client wrote into `answer`."""
    losses, divergence = RowLosses(), panel.divergence()
    row_of = [row for row, tokens in enumerate(reference.trained.tokens) for _ in range(tokens)]
    seen = 0
    for number in range(len(panel.plan)):
        name = f"batch-{number:05d}.safetensors"
        candidate, expected = load_file(answer / name), load_file(reference.directory / name)
        count = len(candidate["losses"])
        losses.add(candidate["losses"], torch.tensor(row_of[seen : seen + count], dtype=torch.int64))
        divergence.add(expected["log_probs"], candidate["log_probs"])
        seen += count
    return losses, divergence


def fill(proof: Proof, reference: Reference, losses: RowLosses, divergence: Divergence) -> None:
    """Put the measurements into a proof; whatever is not finite becomes None, which no gate lets pass."""
    proof.rows, proof.tokens, proof.kl_tokens = len(losses.tokens), sum(losses.tokens), len(divergence.kl)
    proof.loss_base, proof.loss_trained = _finite(reference.base.loss), _finite(reference.trained.loss)
    proof.loss_error = _finite(reference.base.difference_error(reference.trained))
    proof.loss_export = _finite(losses.loss)
    proof.kl_mean, proof.kl_p99 = _finite(divergence.mean), _finite(divergence.p99)
    proof.top1_agreement = _finite(divergence.top1_agreement)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def judge(proof: Proof, config: ExportConfig, form: Format) -> None:
    """Set `retained`, `passed` and, where it did not pass, the reason and what to do.

    Where the improvement is clear of its noise (twice its standard error over rows) the export has to keep
    `config.min_retained` of it; where it is not, dividing by it would say nothing, and mean KL has to be at most
    `config.max_kl`. A lossless format has to pass both.
    """
    proof.retained, proof.passed, proof.reason = None, False, ""
    measured = (proof.loss_base, proof.loss_trained, proof.loss_export, proof.kl_mean)
    if any(value is None for value in measured):
        proof.reason = "its predictions are not finite on the held-out rows"
        return
    base, trained, exported, kl = (float(value) for value in measured)  # type: ignore[arg-type]
    improvement = base - trained
    error = math.inf if proof.loss_error is None else proof.loss_error
    if improvement > 2 * error:
        proof.retained = (base - exported) / improvement
    if proof.retained is not None and proof.retained < config.min_retained:
        asked = f"export.min_retained={config.min_retained:g} is asked"
        proof.reason = f"it keeps {proof.retained:.4f} of the improvement, {asked}: {form.advice}"
    elif (proof.retained is None or form.lossless) and kl > config.max_kl:
        proof.reason = f"kl_mean {kl:.4g} is above export.max_kl={config.max_kl:g}: {form.advice}"
    proof.passed = not proof.reason
