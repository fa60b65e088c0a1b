"""Several adapters as users have them: a stack from the command line, named ones from Python, combined files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finetune as ft
from finetune.cli import VERBS, guarded

ROOT = Path(__file__).parents[1]
STACK = "adapter.parts=[{name: lora, rank: 4, dropout: 0.1}, {name: ia3}, {name: houlsby, width: 8}]"
DIRECTORIES = ("lora", "ia3", "houlsby")
SHORT = ["+experiment=smoke", "tracking=off", "train.preflight=false", "train.samples=0", "train.batch_size=2",
         "train.max_steps=4", "train.save_every=2", "train.eval_every=null", "export.formats=auto"]  # fmt: skip


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}, or {i} twice."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


def test_a_stack_trains_resumes_and_is_saved_by_parts(tmp_path: Path, rows: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train(*SHORT, "adapter=stack", STACK, f"data.train={rows}", f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    notes = json.loads((whole / "run.json").read_text("utf-8"))["notes"]
    assert any(n.startswith("export.formats=auto leaves out safetensors, bnb-nf4: it cannot be merged") for n in notes)
    assert any(n.startswith("vLLM and llama.cpp will not load this adapter") for n in notes)
    for name in ("", *DIRECTORIES):
        document = json.loads((whole / "adapter" / name / "finetune.json").read_text("utf-8"))
        assert document["method"] == (name or "stack") and document["digests"]["base"]
    assert not (whole / "adapter" / "adapter_model.safetensors").exists()

    shutil.copytree(whole, cut)  # what a run that was killed after step 2 leaves
    for gone in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(cut / gone)
    record = json.loads((cut / "run.json").read_text("utf-8"))
    (cut / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), "utf-8")
    done = train(f"resume={cut}")
    assert done.returncode == 0, done.stderr
    for name in DIRECTORIES:
        weights = f"adapter/{name}/adapter_model.safetensors"
        assert (cut / weights).read_bytes() == (whole / weights).read_bytes(), name


def test_named_adapters_train_in_turn_and_combine(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = ft.load("embedded", quant=ft.NF4Config())
    adapters = ft.Adapters(model)
    settings = ft.TrainConfig(max_steps=2, batch_size=2, preflight=False, eval_every=None, save_every=None, samples=0)
    for name in ("one", "two"):
        adapter = adapters.attach(name, ft.LoRAConfig(rank=4))
        ft.train(model, tokenizer, str(rows), adapter, train=settings, output_dir=tmp_path / name)
    stack = adapters.use("one", "two")
    ft.train(model, tokenizer, str(rows), stack, train=settings, output_dir=tmp_path / "both")
    assert {p.name for p in (tmp_path / "both" / "adapter").iterdir()} >= {"one", "two", "adapter_config.json"}
    capsys.readouterr()
    arguments = [f"adapters=[{tmp_path}/one/adapter,{tmp_path}/two/adapter]", "weights=[0.7,0.3]"]
    output = tmp_path / "combined"
    done = subprocess.run([sys.executable, "-m", "finetune", "combine", *arguments, f"output={output}"],
                          cwd=ROOT, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output) and "rank 8: exact" in done.stdout
    adapters.attach("combined", ft.LoRAConfig(path=str(output)))
    assert capsys.readouterr().out == "", "the combination has the origin of its parts"
    adapters.save("combined", tmp_path / "saved")
    origins = [json.loads((d / "finetune.json").read_text("utf-8")) for d in (output, tmp_path / "saved")]
    assert origins[0] == origins[1] and (tmp_path / "saved" / "tokenizer.json").is_file()
    other, _ = ft.load("embedded", quant=ft.Int4Config())
    with pytest.raises(ft.UserError, match=r"trained with another quantization: .*; set quant as it was"):
        ft.Adapters(other).attach("combined", ft.LoRAConfig(path=str(output)))
    with pytest.raises(ft.UserError, match=r"has adapter=lora attached already: .* finetune.Adapters\(model\)"):
        ft.attach(model, ft.LoRAConfig())


def test_bad_words_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["adapters=[a,b]", "weights=[1,1]", "mode=concat,sum", "output=x"], "mode=concat,sum: expected one value"),
        (["adapters=[a", "weights=[1]"], "cannot read the override"),
        (["adapters=[nowhere]", "weights=[1]", "output=x"], "adapter nowhere is not a directory"),
    ):
        assert guarded(lambda arguments=arguments: VERBS["combine"][0](arguments)) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1, said
