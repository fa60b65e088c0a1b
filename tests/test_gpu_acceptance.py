"""What of the GPU acceptance runs on a CPU: its bars, stages and record, and the models it builds, in tiny shapes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_acceptance.py"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT))


def load(name: str):
    return importlib.import_module(name)


class Emitted:
    """Collects what a stage measures."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict]] = []

    def __call__(self, kind: str, key: str, **values) -> None:
        self.lines.append((kind, key, values))

    def values(self) -> dict[str, float]:
        return {key: values["value"] for kind, key, values in self.lines if kind == "value"}

    def notes(self) -> list[str]:
        return [key for kind, key, _ in self.lines if kind == "note"]


def test_no_gpu_is_one_line_and_exit_2():
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, env=settings)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr


class TestBars:
    def test_every_bar_belongs_to_a_stage_and_has_a_key_of_its_own(self):
        bars, stages = load("gpu.bars").BARS, load("gpu.stages").STAGES
        assert {bar.stage for bar in bars} <= {stage.name for stage in stages}
        assert len({bar.key for bar in bars}) == len(bars)

    def test_judgement(self):
        bars = load("gpu.bars")
        measured = {"dequantize": 0.85, "linear_4096_2048": 1.2, "memory_33b": 24.0}
        rows = bars.judged(measured, {"memory_65b": "out of memory"}, {"step": "out of time after 120 s"})
        found = {row["key"]: row for row in rows}
        assert len(rows) == len(bars.BARS)
        assert found["dequantize"]["result"] == "pass"
        assert found["linear_4096_2048"]["result"] == "fail"
        assert found["memory_33b"]["result"] == "fail"
        assert (found["memory_65b"]["result"], found["memory_65b"]["reason"]) == ("fail", "out of memory")
        assert found["step_bf16_4096"]["result"] == "unmeasured"
        assert found["step_bf16_4096"]["reason"] == "out of time after 120 s"
        assert found["fused_bnb"]["reason"] == "not run"
        text = bars.table(rows)
        assert len(text.splitlines()) == len(rows) + 1
        assert ">= 0.8 x" in text and "<= 23.5 GiB" in text

    def test_the_stages_fit_the_limit_typically_and_quick_ones_two_minutes(self):
        stages = load("gpu.stages")
        assert stages.LIMIT[False] < 9 * 60 and stages.LIMIT[True] < 2 * 60
        assert {stage.name for stage in stages.STAGES if stage.quick} == {"environment", "checks", "kernels"}


FAKE_STAGE = """
import json, subprocess, sys, time
name = sys.argv[sys.argv.index("--stage") + 1]
def emit(kind, key, **values): print("@measured " + json.dumps({"kind": kind, "key": key, **values}), flush=True)
print("chatter")
if name == "checks":
    emit("value", "checks", value=0)
    emit("note", "something is not installed")
elif name == "kernels":
    emit("value", "dequantize", value=0.9)
    print("ValueError: went wrong", file=sys.stderr)
    sys.exit(1)
elif name == "step":
    emit("detail", "step_x", tokens={"4096": 1})
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
"""


class TestRecord:
    @pytest.fixture
    def accepted(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        (tmp_path / "out").mkdir()
        fake = tmp_path / "fake.py"
        fake.write_text(FAKE_STAGE, "utf-8")
        acceptance, stages = load("gpu_acceptance"), load("gpu.stages")
        chosen = [
            stages.Stage(name, seconds, True, None) for name, seconds in (("checks", 30), ("kernels", 30), ("step", 1))
        ]
        record = acceptance.Record(tmp_path / "results" / "gpu_fake.json", quick=True)
        begun = time.perf_counter()
        acceptance.accept(record, chosen, "cpu", 100, fake)
        assert time.perf_counter() - begun < 30
        return record, tmp_path

    def test_a_stage_that_fails_or_hangs_costs_the_others_nothing(self, accepted):
        _, folder = accepted
        written = json.loads((folder / "results" / "gpu_fake.json").read_text("utf-8"))
        assert written == json.loads((folder / "out" / "gpu_fake.json").read_text("utf-8"))
        assert written["format_version"] == 1
        rows = {row["key"]: row for row in written["rows"]}
        assert rows["checks"]["result"] == "pass"
        assert rows["dequantize"]["measured"] == 0.9  # measured before the stage failed
        assert rows["fused_bf16"] == {**rows["fused_bf16"], "result": "unmeasured", "reason": "ValueError: went wrong"}
        assert "out of time" in rows["step_peft_4096"]["reason"]
        assert rows["memory_33b"]["reason"] == "not run"
        assert written["notes"] == ["something is not installed"]
        assert written["details"]["step_x"] == {"tokens": {"4096": 1}}
        assert "went wrong" in written["details"]["log_kernels"]["log"]
        assert "chatter" in written["details"]["log_kernels"]["out"]

    def test_no_time_left(self, tmp_path):
        acceptance, stages = load("gpu_acceptance"), load("gpu.stages")
        record = acceptance.Record(tmp_path / "gpu_fake.json", quick=False)
        acceptance.accept(record, [stages.Stage("checks", 30, True, None)], "cpu", 5)
        assert record.rows()[0]["reason"] == "no time left"

    def test_a_real_stage_through_the_script(self, tmp_path, monkeypatch):
        acceptance, stages = load("gpu_acceptance"), load("gpu.stages")
        acceptance.prepare_environment()
        record = acceptance.Record(tmp_path / "gpu_cpu.json", quick=True)
        acceptance.accept(record, [stage for stage in stages.STAGES if stage.name == "environment"], "cpu", 100)
        assert record.stages["environment"].reason is None
        assert record.details["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    def test_names(self):
        assert load("gpu_acceptance").slug("NVIDIA H200") == "nvidia_h200"


class TestModels:
    def test_is_quantized_as_it_is_made(self):
        from finetune.quant.base import FrozenLinear
        from finetune.quant.nf4 import NF4Config

        model = load("gpu.models").random_llama("tiny", NF4Config(), CPU)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
        assert len(frozen) == 2 * 7
        assert all(4 < module.bits_per_weight() < 4.7 for module in frozen)
        assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))

    def test_trains_with_checkpointing_and_its_loss_falls(self):
        memory = load("gpu.memory")
        found = memory.train_steps("tiny", CPU, rank=4, dtype="bf16", length=64, steps=3)
        assert memory.learns(found["losses"])
        assert found["trained"] == 2 * 4 * (4 * 128 + 3 * 160)
        assert not memory.learns([1.0, float("nan")]) and not memory.learns([1.0, 1.5])

    def test_ballast_leaves_the_budget(self):
        ballast = load("gpu.memory").ballast_bytes
        assert ballast(total=140, used=1, budget=24) == 116
        assert ballast(total=20, used=1, budget=24) == 0
        assert ballast(total=140, used=30, budget=24) == 110

    def test_what_does_not_fit_is_a_failure_with_the_peak_it_would_have(self, monkeypatch):
        memory = load("gpu.memory")
        budgets = []

        def within(size, budget, device, dtype):
            budgets.append(budget)
            if len(budgets) == 1:
                raise torch.OutOfMemoryError("tried to allocate 1 GiB")
            return {"peak_gib": 24.2, "losses": [3.0, 2.0]}

        monkeypatch.setattr(memory, "within", within)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 140 * memory.GIB))
        emitted = Emitted()
        memory.prove("33b", 23.5, emitted, CPU)
        assert budgets == [int(23.5 * memory.GIB), 140 * memory.GIB]
        assert emitted.values() == {"memory_33b": 24.2}
        faults = [values["reason"] for kind, _, values in emitted.lines if kind == "fault"]
        assert len(faults) == 1 and "out of memory within 23.5 GiB" in faults[0]

    def test_engines_agree_and_their_ratios_come_out(self):
        emitted = Emitted()
        load("gpu.steps").compare("tiny", (64,), emitted, CPU)
        assert set(emitted.values()) == {"step_bf16_64", "step_peft_64"}, emitted.notes()
        curves = [values["tokens"]["64"]["losses"] for kind, _, values in emitted.lines if kind == "detail"]
        assert len(curves) == 3
        assert all(curve[-1] < curve[0] for curve in curves)
        assert max(curve[-1] for curve in curves) - min(curve[-1] for curve in curves) < 0.01 * curves[0][-1]

    def test_a_rival_that_is_missing_is_a_note(self, monkeypatch):
        steps = load("gpu.steps")

        def missing(size, device):
            raise ModuleNotFoundError("No module named 'peft'")

        monkeypatch.setattr(steps, "ENGINES", {**steps.ENGINES, "PEFT + bitsandbytes NF4": missing})
        emitted = Emitted()
        steps.compare("tiny", (32,), emitted, CPU)
        assert set(emitted.values()) == {"step_bf16_32"}
        assert emitted.notes() == ["PEFT + bitsandbytes NF4: ModuleNotFoundError: No module named 'peft'"]


class TestKernels:
    @pytest.fixture
    def kernels(self, monkeypatch):
        kernels = load("gpu_kernels")

        def timed(call, repeat=0):
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        monkeypatch.setattr(kernels, "milliseconds", timed)
        monkeypatch.setattr(kernels, "SMALL", (4096, 64))
        monkeypatch.setattr(kernels, "LARGE", (6656, 128))
        return kernels

    def test_every_benchmark_reports_its_bars(self, kernels):
        emitted = Emitted()
        kernels.dequantize(emitted, CPU)
        kernels.few_rows(emitted, CPU)
        kernels.training_linear(emitted, CPU, rows=(4,))
        assert set(emitted.values()) == {"dequantize", "fused_bf16", "fused_bnb", "linear_4096_4", "linear_6656_4"}
        assert not emitted.notes()
        assert all(value > 0 for value in emitted.values().values())

    def test_candidates_are_well_formed(self, kernels):
        for rows in kernels.TUNED:
            found = list(kernels.candidates(rows))
            assert found and all(plan.max_m == rows for plan in found)
            assert all(plan.kernel == "dot" and plan.block_m >= 16 for plan in found)

    def test_tuning_keeps_the_rules_of_float32_and_stops_where_decoding_wins(self, kernels, monkeypatch):
        from finetune.kernels import dispatch

        times = iter([5.0, *[1.0] * 36, 1.0, *[5.0] * 36])  # decoding first, then candidates: fused wins, then loses
        monkeypatch.setattr(kernels, "milliseconds", lambda call, repeat=0: next(times))
        found = kernels.tune(Emitted(), CPU, "codebook4", kernels.LARGE)
        assert [rule.kernel for rule in found] == ["sum", "dot"]
        assert found[0] in dispatch.rules("default", "codebook4", "large")
        assert next(times, None) is None

    def test_a_failing_benchmark_is_a_note(self, kernels, monkeypatch):
        def broken(emit, device):
            raise RuntimeError("no such kernel")

        for name in ("dequantize", "few_rows", "training_linear", "liger"):
            monkeypatch.setattr(kernels, name, broken)
        emitted = Emitted()
        kernels.measure_all(emitted, CPU)
        assert emitted.notes() == ["broken: RuntimeError: no such kernel"] * 4


class TestTraining:
    def test_losses_are_compared_bit_for_bit(self, tmp_path):
        training = load("gpu.training")
        lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 1.5}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
        curve = training.losses(tmp_path)
        assert curve == {1: 2.0, 2: 1.5}
        assert training.differing(curve, {1: 2.0, 2: 1.5000001, 3: 1.0}) == [2, 3]
        assert training.largest_difference(curve, {1: 2.0, 2: 1.53}) == pytest.approx(0.02)
        assert training.largest_difference(curve, {1: 2.0}) == 1.0

    def test_every_command_line_is_one_that_train_py_takes(self, tmp_path):
        from finetune.compose import compose_config

        training = load("gpu.training")
        for name, settings in training.RUNS.items():
            overrides = training.command(tmp_path / name, "cpu", *settings)[2:]
            assert compose_config(overrides, ROOT / "conf").device == "cpu"
