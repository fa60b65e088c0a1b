"""One run from its configuration to its report: the rooms in their order."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from finetune.config import RunConfig, save_config
from finetune.device import make_accelerator, resolve_dtype, torch_dtype
from finetune.errors import ProofError


@dataclass
class Outcome:
    """What became of a run: its directory, exit code, and the best held-out loss in nats a token."""

    directory: Path
    exit_code: int = 0
    eval_loss: float | None = None
    failed_exports: list[str] = field(default_factory=list)


def run_job(config: RunConfig, tree: DictConfig, overrides: list[str]) -> Outcome:
    """Train, save, export, prove and report.

    Args:
        config: the whole configuration, checked (checks.py).
        tree: the same as OmegaConf, saved as config.yaml.
        overrides: the command line's own.

    Raises:
        UserError: anything the user can mend, before or during the run.
    """
    from finetune.training.run_directory import RunDirectory, shared_run

    accelerator = make_accelerator(config.device)

    def open_run() -> RunDirectory:
        if config.resume:
            return RunDirectory.resume(config.resume)
        return RunDirectory.create(config.name, config.output_dir)

    with shared_run(accelerator, open_run) as run:
        if run.resumed and run.record["status"] == "finished":
            say(accelerator, f"this run is finished already: {run.path}")
            say(accelerator, str(run.path))
            return Outcome(run.path, eval_loss=run.record.get("best_eval"))
        if run.writable:
            save_config(tree, overrides, run.path / "config.yaml")
        run.start()
        return Runner(config, tree, accelerator, run).go()


WORSE = "the base does better on these rows; train for fewer steps, evaluate more often, or learn more slowly"


def improvement(result: Any, unit: str) -> str:
    """What the training has changed of the held-out loss, and of what else was measured, in a line."""
    fall = 1 - result.best_eval / result.first_eval
    change = f"{fall:.1%} lower" if fall >= 0 else f"{-fall:.1%} higher: {WORSE}"
    text = f"held-out loss {result.first_eval:.4f} -> {result.best_eval:.4f} {unit} ({change})"
    for name, best in result.best_metrics.items():
        first = result.first_metrics.get(name)
        if first is not None and best is not None:
            text += f", {name} {first:.4f} -> {best:.4f}"
    return text


def say(accelerator: Any, text: str) -> None:
    """Print on rank 0."""
    if accelerator.is_main_process:
        print(text, flush=True)


def export_source(loaded: Any, adapter: Any, tokenizer: Any, dtype: str, config: Any, calibration: Any) -> Any:
    """What the export room needs of a loaded, adapted model; 32-bit runs export their dense weights in bf16."""
    from finetune.export.base import ExportSource

    return ExportSource(
        model=loaded.model,
        adapter=adapter,
        tokenizer=tokenizer,
        base_path=loaded.base_path,
        dtype=torch_dtype("bf16" if dtype == "fp32" else dtype),
        quantization_config=loaded.quantization_config,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        digests=loaded.digests,
        storage=loaded.storage,
        calibration=calibration,
        pad_id=loaded.pad_id,
        task=loaded.task,
        key_mapping=loaded.key_mapping,
    )


def labelling_of(loaded: Any) -> Any:
    """How the labels of rows are learnt by a loaded model; None where it gives tokens."""
    from finetune.data.labels import Labelling
    from finetune.model.task_head import reads_segments

    return Labelling(loaded.task.labels, reads_segments(loaded.model)) if loaded.task.judges_rows else None


class Runner:
    """The rooms of one run, sequenced; each step is a method, in order of use."""

    def __init__(self, config: RunConfig, tree: DictConfig, accelerator: Any, run: Any) -> None:
        self.config, self.tree, self.accelerator, self.run = config, tree, accelerator, run
        self.dtype = resolve_dtype(config.train.dtype, accelerator.device)
        config.train.dtype = self.dtype
        self.tracker: Any = None

    def go(self) -> Outcome:
        """The whole run; whatever ends it, the tracker is told."""
        try:
            return self.sequence()
        except BaseException:
            if self.tracker is not None:
                self.tracker.finish(1)
            raise

    def sequence(self) -> Outcome:
        """Load, prepare, check, train, and what follows."""
        with self.run.phase("load"):
            self.load()
        with self.run.phase("data"):
            self.prepare()
        resumed = self.run.resumed
        self.track()
        if self.config.train.preflight and not resumed:
            with self.run.phase("preflight"):
                self.preflight()
        result = self.train()
        if result.status == "interrupted":
            exit_code = 128 + (result.signal or signal.SIGINT)
            self.tracker.finish(exit_code)
            self.run.update(status="interrupted")
            say(self.accelerator, f"interrupted at step {result.steps}; go on with resume={self.run.path}")
            say(self.accelerator, str(self.run.path))
            return Outcome(self.run.path, exit_code, result.best_eval)
        if not self.accelerator.is_main_process:
            return Outcome(self.run.path, eval_loss=result.best_eval)
        return self.finish(result)

    def load(self) -> None:
        import torch

        from finetune.adapters.attach import attach
        from finetune.adapters.provenance import check_provenance
        from finetune.checks import export_formats, task_of
        from finetune.export.directory import published
        from finetune.model.load import load, storage

        config = self.config
        self.run.imports_done()
        how = (storage(config.model) if config.quant.name == "keep" else None) or config.quant.name
        say(self.accelerator, f"loading {config.model.path} ({how}, {self.dtype} on {self.accelerator.device})")
        task = task_of(config)
        torch.manual_seed(config.seed)  # a head that the checkpoint lacks is drawn while it loads
        device = str(self.accelerator.device)
        self.loaded = load(config.model, config.quant, torch_dtype(self.dtype), device, task)
        for part in config.adapter.starts():
            saved, allow = Path(part.path or ""), part.allow_other_quant
            self.loaded.notes += check_provenance(saved, self.loaded.digests, allow, quantization=self.loaded.storage)
        torch.manual_seed(config.seed)
        start = self.run.path / "start"
        adapter = config.adapter
        if self.run.resumed and adapter.path is None and start.is_dir():
            adapter = replace(adapter, path=str(start))
        adapter.read_tokenizer(self.loaded.tokenizer)
        self.adapter = attach(self.loaded.model, adapter, self.loaded.originals)
        # Once more: some methods know only by what is stored what can be written of them.
        self.formats, left_out = export_formats(config.export.formats, self.adapter)
        if self.adapter.keeps_start and adapter.path is None and self.run.writable:
            with published(start) as work:
                self.adapter.save(work)
        trained = sum(p.numel() for p in self.adapter.trainable().values())
        total = sum(getattr(module, "weights", 0) for module in self.loaded.model.modules())
        say(
            self.accelerator,
            f"training {trained:,} adapter weights" + (f" beside {total:,} frozen ones" if total else ""),
        )
        for note in dict.fromkeys(filter(None, [self.adapter.note, *self.loaded.notes, left_out])):
            self.run.note(note)
            say(self.accelerator, note)
        self.run.update(
            device=str(self.accelerator.device),
            dtype=self.dtype,
            seed=config.seed,
            digests=self.loaded.digests,
            processes=self.accelerator.num_processes,
            trainable=trained,
        )

    def prepare(self) -> None:
        from finetune.checks import check_training
        from finetune.data.prepare import prepare
        from finetune.model.digest import json_digest

        context, labelling = check_training(self.config, self.adapter), labelling_of(self.loaded)
        with self.accelerator.main_process_first():
            self.data = prepare(
                self.config.data,
                self.loaded.tokenizer,
                context=context,
                seed=self.config.seed,
                labelling=labelling,
                pairs=self.loaded.task.kind == "seq2seq",
            )
        if self.data.template:
            self.loaded.tokenizer.chat_template = self.data.template
            self.loaded.digests["chat_template"] = json_digest(self.data.template)
        for line in self.data.report.lines():
            say(self.accelerator, line)
        self.max_length = self.data.report.max_length

    def track(self) -> None:
        from finetune.training.config import OBJECTIVES, TRACKERS
        from finetune.training.trackers.off import OffConfig

        tracking = self.config.tracking if self.accelerator.is_main_process else OffConfig()
        self.tracker = TRACKERS.build(tracking, self.run)
        self.objective = OBJECTIVES.build(self.config.objective, self.loaded.model)
        self.run.update(loss_unit=getattr(self.objective, "unit", "nats per token"))

    def preflight(self) -> None:
        from finetune.training.preflight import preflight

        lines = preflight(
            self.loaded.model,
            self.adapter,
            self.data.train,
            objective=self.objective,
            tokenizer=self.loaded.tokenizer,
            config=self.config.train,
            accelerator=self.accelerator,
            pad_id=self.loaded.pad_id,
            packing=self.data.packing,
        )
        for line in lines:
            say(self.accelerator, line)

    def train(self) -> Any:
        from finetune.training.loop import train

        return train(
            self.loaded.model,
            self.adapter,
            self.data.train,
            self.data.eval,
            objective=self.objective,
            config=self.config.train,
            optim=self.config.optim,
            run=self.run,
            tracker=self.tracker,
            accelerator=self.accelerator,
            pad_id=self.loaded.pad_id,
            packing=self.data.packing,
            max_length=self.max_length,
            seed=self.config.seed,
        )

    def finish(self, result: Any) -> Outcome:
        """Everything after the last step; on rank 0 alone."""
        from finetune.report import write_report

        self.save_adapter()
        with self.run.phase("samples"):
            samples = self.samples()
        with self.run.phase("export"):
            proofs = self.export()
        self.run.update(
            status="finished",
            best_eval=result.best_eval,
            first_eval=result.first_eval,
            last_eval=result.last_eval,
            first_metrics=result.first_metrics,
            best_metrics=result.best_metrics,
            steps=result.steps,
            stopped=result.status,
            skipped_steps=result.skipped_steps,
        )
        if result.first_eval is not None and result.best_eval is not None:
            print(improvement(result, getattr(self.objective, "unit", "nats a token")), flush=True)
        report = write_report(self.run.path)
        failed = [proof.format for proof in proofs if not proof.passed]
        exit_code = ProofError.exit_code if failed else 0
        self.tell_tracker(result, samples, proofs, exit_code)
        print(f"report: {report}")
        if failed:
            print(f"not proven: {', '.join(failed)}; each export.json says why, the others stand", flush=True)
        print(self.run.path, flush=True)
        return Outcome(self.run.path, exit_code, result.best_eval, failed)

    def save_adapter(self) -> None:
        from finetune.export.adapter import save_adapter
        from finetune.export.servers import notes, read_saved

        save_adapter(self.adapter, self.loaded, self.run.path / "adapter")
        for note in notes(read_saved(self.run.path / "adapter"), self.adapter.mergeable):
            self.run.note(note)
            say(self.accelerator, note)

    def samples(self) -> list[list[str]]:
        from finetune.samples import answer, verdicts, write_samples

        chosen = self.data.prompts[: self.config.train.samples]
        if not chosen:
            return []
        model = self.loaded.model

        def ask() -> list[str]:
            if self.loaded.task.judges_rows:
                return verdicts(model, [(sample.prompt_ids, sample.token_types) for sample in chosen])
            prompts = [sample.prompt_ids for sample in chosen]
            return answer(model, self.loaded.tokenizer, prompts, self.config.train.sample_tokens)

        with self.adapter.disabled():
            before = ask()
        after = ask()
        rows = [(s.prompt, s.reference, b, a) for s, b, a in zip(chosen, before, after, strict=True)]
        write_samples(self.run.path / "samples.md", rows)
        for prompt, reference, first, last in rows:
            print(
                f"\n{prompt.strip()}\n  reference: {reference.strip()}\n  before:    {first}\n  after:     {last}",
                flush=True,
            )
        print()
        return [list(row) for row in rows]

    def export(self) -> list[Any]:
        from finetune.export.export import export, proof_table

        if not self.formats:
            return []
        config = replace(self.config.export, formats=self.formats)
        source = export_source(
            self.loaded, self.adapter, self.loaded.tokenizer, self.dtype, self.config.export, self.data.train
        )
        proofs = export(source, self.run.path / "export", config, self.data.eval, self.loaded.pad_id)
        print(proof_table(proofs), flush=True)
        return proofs

    def tell_tracker(self, result: Any, samples: list[list[str]], proofs: list[Any], exit_code: int) -> None:
        if samples:
            self.tracker.table("samples", ["prompt", "reference", "before", "after"], samples)
        figures = asdict(result) | {f"best_{name}": value for name, value in result.best_metrics.items()}
        summary = {key: value for key, value in figures.items() if isinstance(value, (int, float, str))}
        for proof in proofs:
            summary |= {
                f"proof/{proof.format}/{key}": value for key, value in proof.to_dict().items() if key != "format"
            }
        self.tracker.summary(summary)
        self.tracker.artifact(self.run.path / "adapter", f"{self.config.name}-adapter")
        self.tracker.finish(exit_code)
