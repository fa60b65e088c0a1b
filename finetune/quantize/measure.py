"""How far the quantized model is from the dense one, on text that neither was calibrated on.

Shape suffixes: B rows, P positions, H numbers at each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch
from finetune.evaluation import Divergence, Predictions, RowLosses, predictions
from finetune.metrics import classification_metrics
from finetune.quantize.text import measured_on
from finetune.structure.head import captured

Figures = dict[str, float | int | None]
Call = Callable[..., Any]


class Comparison:
    """What a quantized model predicts against what the dense one does, slice by slice."""

    def __init__(self) -> None:
        self._dense, self._losses, self._divergence = RowLosses(), RowLosses(), Divergence()

    def add(self, dense: Predictions, quantized: Predictions) -> None:
        """Both models at the same positions, wherever they are."""
        self._dense.add(dense.losses_P(), dense.rows_P)
        self._losses.add(quantized.losses_P(), quantized.rows_P)
        self._divergence.add(dense.log_probs_PV.cpu(), quantized.log_probs_PV.cpu())

    def figures(self) -> Figures:
        """Losses in nats a token, KL(dense || quantized)."""
        before, after = self._dense.loss, self._losses.loss
        return {
            "tokens": len(self._divergence.kl),
            **self._losses_of_both(),
            "perplexity_dense": figure_or_none(math.exp(min(before, 700))),
            "perplexity": figure_or_none(math.exp(min(after, 700))),
            **self._divergences(),
        }

    def _losses_of_both(self) -> Figures:
        return {"loss_dense": figure_or_none(self._dense.loss), "loss": figure_or_none(self._losses.loss)}

    def _divergences(self) -> Figures:
        return {
            "kl_mean": figure_or_none(self._divergence.mean),
            "kl_p99": figure_or_none(self._divergence.p99),
            "top1_agreement": figure_or_none(self._divergence.top1_agreement),
        }


class ClassComparison(Comparison):
    """The classes that two classifiers give rows.

    Args:
        labelled: whether the rows' own classes are known.
    """

    def __init__(self, labelled: bool) -> None:
        super().__init__()
        self.labelled = labelled
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._classes = 0

    def add(self, dense: Predictions, quantized: Predictions) -> None:
        super().add(dense, quantized)
        self._classes = dense.log_probs_PV.shape[1]
        parts = (dense.log_probs_PV.argmax(1), quantized.log_probs_PV.argmax(1), dense.targets_P)
        self._seen.append(tuple(part.cpu() for part in parts))  # type: ignore[arg-type]

    def figures(self) -> Figures:
        """Losses in nats a row, share of rows that are right, Matthews correlation, KL between the classes."""
        told: Figures = {}
        if self.labelled:
            told = self._losses_of_both()
            before, after, targets = (torch.cat(parts).numpy() for parts in zip(*self._seen, strict=True))
            for ending, predicted in (("_dense", before), ("", after)):
                metrics = classification_metrics(predicted, targets, self._classes)
                told |= {f"{key}{ending}": metrics[key] for key in ("accuracy", "matthews")}
        return {"rows": len(self._divergence.kl), **told, **self._divergences()}


class Distances:
    """Hidden states of two models, [P, H] at a time."""

    def __init__(self) -> None:
        self._positions, self._error, self._size, self._cosine, self._wide = 0, 0.0, 0.0, 0.0, False

    def add(self, dense_PH: Tensor, quantized_PH: Tensor) -> None:
        """Both at the same positions."""
        before_PH, after_PH = dense_PH.double().cpu(), quantized_PH.double().cpu()
        self._positions += len(before_PH)
        self._wide = before_PH.shape[1] > 1
        self._error += float((after_PH - before_PH).pow(2).sum())
        self._size += float(before_PH.pow(2).sum())
        self._cosine += float(torch.cosine_similarity(before_PH, after_PH, dim=1).sum())

    def figures(self) -> Figures:
        """`relative_error` is |quantized - dense| / |dense| at all positions, `cosine` their mean; none of numbers."""
        error = math.sqrt(self._error / self._size) if self._size else math.nan
        told: Figures = {"positions": self._positions, "relative_error": figure_or_none(error)}
        return told | ({"cosine": figure_or_none(self._cosine / self._positions)} if self._wide else {})


class Measure(ABC):
    """What is compared of two models.

    Attributes:
        width: numbers at each position that is compared.
    """

    width: int

    @abstractmethod
    def seen(self, model: Call, rows: Iterable[Batch], device: torch.device) -> Iterator[Any]:
        """What a model says of rows, in slices."""

    @abstractmethod
    def comparison(self) -> Any:
        """Takes slices of two models by `add`, and then says what `figures` there are."""

    def kept(self, seen: Any) -> Any:
        """A slice as it is kept until the other model is there."""
        return seen


class Tokens(Measure):
    """The tokens that are predicted, by distributions over a vocabulary of `width`."""

    def __init__(self, width: int) -> None:
        self.width = width

    def seen(self, model: Call, rows: Iterable[Batch], device: torch.device) -> Iterator[Predictions]:
        return predictions(model, rows, device)  # type: ignore[arg-type]

    def comparison(self) -> Any:
        return Comparison()

    def kept(self, seen: Predictions) -> Predictions:
        return Predictions(seen.log_probs_PV.cpu(), seen.targets_P.cpu(), seen.rows_P.cpu())


class Classes(Tokens):
    """The classes of rows.

    Args:
        labelled: whether the rows' own classes are known.
    """

    def __init__(self, width: int, labelled: bool) -> None:
        super().__init__(width)
        self.labelled = labelled

    def comparison(self) -> Any:
        return ClassComparison(self.labelled)


class Vectors(Measure):
    """The last hidden states of a model that predicts no token to come; or the numbers that it gives rows.

    Args:
        module: of the model, whose first output is compared.
        width: features of that.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module, self.width = module, width

    @torch.no_grad()
    def seen(self, model: Call, rows: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
        for batch in rows:
            with captured(self.module) as outputs:
                model(**batch.to(device).model_inputs())
            yield outputs[0].flatten(0, -2)

    def comparison(self) -> Any:
        return Distances()

    def kept(self, seen: Tensor) -> Tensor:
        return seen.cpu()


class Remembered:
    """What the dense model says of rows, kept until it is quantized.

    Args:
        model: dense.
        rows: held out.
        measure: what of it is compared.
    """

    def __init__(self, model: nn.Module, rows: list[Batch], measure: Measure) -> None:
        self._rows, self._measure = rows, measure
        self._dense = [measure.kept(seen) for seen in measure.seen(model, rows, _device(model))]

    def compare(self, model: nn.Module) -> Figures:
        """The quantized model against it."""
        comparison = self._measure.comparison()
        for dense, seen in zip(self._dense, self._measure.seen(model, self._rows, _device(model)), strict=True):
            comparison.add(dense, seen)
        return comparison.figures()


class Reference(Remembered):
    """What a dense causal language model predicts on held-out pieces.

    Args:
        model: dense.
        pieces: of tokens.
    """

    def __init__(self, model: Any, pieces: list[Tensor]) -> None:
        width = int(model.get_output_embeddings().weight.shape[0])
        super().__init__(model, measured_on(pieces, width), Tokens(width))


def figure_or_none(value: float) -> float | None:
    """A figure for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
