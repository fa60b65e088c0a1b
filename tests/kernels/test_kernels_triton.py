"""The Triton kernels, run by Triton's interpreter and compiled for GPUs that are not here.

Both in processes of their own: the interpreter is chosen by the environment before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from finetune.kernels import dispatch, scratch, triton_backend

ROOT = Path(__file__).parents[2]
NO_TRITON = "Triton is not installed: pip install 'triton>=3.6' (Linux only)"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason=NO_TRITON)


def child(command: list[str], **environment: str) -> list[dict]:
    """The JSON lines that a script prints."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=settings, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    assert done.returncode == 0, [line for line in lines if not line.get("passed", True)] or done.stderr[-2000:]
    return lines


@needs_triton
def test_interpreter():
    """Every check that a GPU would be put to, on CPU tensors."""
    lines = child(["scripts/gpu/checks.py", "--device", "cpu"], TRITON_INTERPRET="1", FINETUNE_CPU="off")
    assert len(lines) >= 10
    assert all(line["passed"] for line in lines), lines


@needs_triton
def test_compiles_for_gpus(tmp_path):
    """Each kernel becomes machine code for two generations of NVIDIA and one of AMD, within their shared memory."""
    lines = child(["tests/kernels/triton_compile_child.py"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    kernels = {line["kernel"] for line in lines}
    assert kernels == {
        *(f"triton_{family}._dequantize" for family in ("codebook4", "int8", "affine")),
        *(f"triton_product.{kernel}" for kernel in ("_sum", "_dot", "_add_up")),
        *(f"triton_fused.{name}{way}" for name in ("_rms_norm", "_act_mul") for way in ("", "_backward")),
        "triton_codebook4._quantize",
        "triton_fused._rope",
    }
    assert {line["target"] for line in lines} == {"80", "90", "gfx942"}
    assert all(line["bytes"] > 1000 and line["shared"] <= 64 * 1024 for line in lines)


@needs_triton
@pytest.mark.parametrize(
    "operator",
    [f"{kind}_{form}" for kind in ("dequantize", "linear", "input_gradient") for form in ("4bit", "int8", "affine")]
    + ["quantize_4bit", "llm_int8", "rms_norm", "rms_norm_backward", "act_mul", "act_mul_backward", "rope"],
)
def test_registered_for_gpus(operator):
    """The kernels stand before the reference on CUDA (ROCm) and XPU, and Triton is not imported for that."""
    from finetune.kernels import affine, fused, int8, ops  # noqa: F401

    for key in ("CUDA", "XPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"finetune::{operator}", key)


def test_importing_the_operators_imports_no_triton():
    code = "import sys, finetune.kernels.ops, finetune.kernels.int8; print({'triton': 'triton' in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "{'triton': False}"


class TestDispatch:
    CPU = torch.device("cpu")

    def test_few_rows_are_fused_and_many_are_not(self):
        chosen = [
            dispatch.choose("codebook4", rows, 4096, 4096, torch.bfloat16, self.CPU) for rows in (1, 16, 64, 2048)
        ]
        assert [rule and rule.kernel for rule in chosen] == ["dot", "dot", "dot", None]

    @pytest.mark.parametrize("family", ["codebook4", "int8", "affine"])
    def test_every_rule_is_well_formed(self, family):
        for kind in dispatch.read_table():
            for size in ("small", "large"):
                for rule in dispatch.rules(kind, family, size):
                    assert rule.kernel in ("sum", "dot")
                    assert rule.block_m >= min(rule.max_m, 4) if rule.kernel == "sum" else rule.block_m >= 16
                    for value in (rule.block_m, rule.block_o, rule.block_k):
                        assert value & (value - 1) == 0

    @pytest.mark.parametrize(("width", "block"), [(4096, 64), (96, 32), (11008, 64), (33, None), (48, None)])
    def test_a_tile_divides_the_width(self, width, block):
        rule = dispatch.choose("codebook4", 8, 64, width, torch.bfloat16, self.CPU)
        assert (rule and rule.block_k) == block

    def test_float32_keeps_off_the_matrix_units(self):
        assert dispatch.choose("codebook4", 8, 4096, 4096, torch.float32, self.CPU) is None
        assert dispatch.choose("codebook4", 1, 4096, 4096, torch.float32, self.CPU).kernel == "sum"

    def test_parts_fill_the_device_and_no_more(self):
        rule = dispatch.Fused(16, "dot", 16, 64, 128, programs=528)
        assert rule.parts(6656, 17920) == 5
        assert rule.parts(64 * 600, 4096) == 1
        assert rule.parts(64, 256) == 2

    def test_a_measured_entry_goes_before_the_default(self, tmp_path):
        path = tmp_path / "dispatch.json"
        path.write_text(dispatch.TABLE.read_text("utf-8"), "utf-8")
        rule = dispatch.Fused(4, "dot", 16, 32, 64)
        dispatch.write_rules("cuda-9.0", "int8", "large", [rule], path)
        table = dispatch.read_table(path)
        assert table["cuda-9.0"]["int8"]["large"] == [vars(rule)]
        assert table["cuda-9.0"]["int8"]["small"] == table["default"]["int8"]["small"]
        assert table["default"] == dispatch.read_table()["default"]

    def test_the_committed_file_is_as_the_writer_writes_it(self):
        assert dispatch.TABLE.read_text("utf-8") == dispatch.render(dispatch.read_table())


class TestScratch:
    CPU = torch.device("cpu")

    def setup_method(self):
        scratch.release()

    teardown_method = setup_method

    def test_is_reused_and_grows(self):
        with scratch.borrowed((4, 8), torch.float32, self.CPU) as first:
            address = first.data_ptr()
        with scratch.borrowed((2, 16), torch.bfloat16, self.CPU) as second:
            assert second.data_ptr() == address
            assert second.shape == (2, 16)
        assert scratch.held_bytes() == 128
        with scratch.borrowed((64, 64), torch.float32, self.CPU):
            pass
        assert scratch.held_bytes() == 64 * 64 * 4
        scratch.release()
        assert scratch.held_bytes() == 0

    def test_products_are_those_of_the_decoded_weight(self):
        w_OI, x_BI = torch.randn(5, 7), torch.randn(2, 3, 7)
        decode = lambda out, weight: out.copy_(weight)  # noqa: E731
        bias_O = torch.randn(5)
        y = scratch.linear_by_scratch(x_BI, bias_O, (5, 7), decode, (w_OI,))
        assert torch.equal(y, torch.nn.functional.linear(x_BI, w_OI, bias_O))
        assert torch.equal(scratch.gradient_by_scratch(y, (5, 7), decode, (w_OI,)), y @ w_OI)

    def test_what_inference_mode_made_serves_outside(self):
        with torch.inference_mode(), scratch.borrowed((8,), torch.float32, self.CPU) as borrowed:
            borrowed.zero_()
        with scratch.borrowed((8,), torch.float32, self.CPU) as borrowed:
            assert not borrowed.is_inference()
            assert torch.equal(borrowed.add_(1), torch.ones(8))  # the same memory, and open to be written

    def test_every_thread_has_its_own_on_a_cpu(self):
        from concurrent.futures import ThreadPoolExecutor

        def address(_: int) -> int:
            with scratch.borrowed((8,), torch.float32, self.CPU) as borrowed:
                return borrowed.data_ptr()

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(address, 0).result() != address(0)


class TestBackend:
    @pytest.fixture(autouse=True)
    def forget(self):
        triton_backend.why_off.cache_clear()
        yield
        triton_backend.why_off.cache_clear()

    def test_is_off_by_name(self, monkeypatch):
        monkeypatch.setenv("FINETUNE_TRITON", "off")
        assert triton_backend.why_off() == "FINETUNE_TRITON=off"

    @needs_triton
    def test_is_off_without_a_compiler_for_its_launchers(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "C compiler" in triton_backend.why_off()

    def test_registers_nothing_while_off(self, monkeypatch):
        monkeypatch.setenv("FINETUNE_TRITON", "off")
        triton_backend.register("no_such_operator", "nowhere", "nothing")
        assert "finetune::no_such_operator" not in torch._C._dispatch_get_all_op_names()

    def test_launches_on_a_cpu_tensor_choose_no_device(self):
        assert isinstance(triton_backend.on(torch.zeros(1)), nullcontext)
