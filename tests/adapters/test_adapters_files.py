"""Saved adapters that are wrong, from elsewhere, or of another base: each refused in words that say what to mend."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters_models import frozen, logits, lora
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach, check_path
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.provenance import FORMAT_VERSION, check_provenance, write_provenance
from finetune.errors import ConfigError, ModelError, UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SAMPLE = Path(__file__).parent / "samples" / "adapter-v1"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _, adapter = lora("llama", targets=["q_proj", "v_proj"])
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(directory: Path, kind: type[UserError] = ModelError, **settings: object) -> str:
    """The one line that loading says."""
    with pytest.raises(kind) as raised:
        attach(frozen("llama"), LoRAConfig(path=str(directory), **settings))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    return str(raised.value)


def early(directory: Path) -> str:
    """What is said before any model is loaded."""
    with pytest.raises(ModelError) as raised:
        check_path(LoRAConfig(path=str(directory)))
    return str(raised.value)


def edit(directory: Path, **values: object) -> Path:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def change(directory: Path, key: str, tensor: torch.Tensor | None) -> str:
    tensors = load_file(directory / WEIGHTS)
    full = next((name for name in tensors if name.endswith(key)), key)
    tensors.pop(full, None)
    if tensor is not None:
        tensors[full] = tensor
    save_file(tensors, directory / WEIGHTS)
    return full


def test_a_good_one_loads(saved: Path) -> None:
    check_path(LoRAConfig(path=str(saved)))
    attach(frozen("llama"), LoRAConfig(path=str(saved)))


def test_missing_directory(tmp_path: Path) -> None:
    assert "nowhere is not a directory" in early(tmp_path / "nowhere")


def test_missing_config(saved: Path) -> None:
    (saved / CONFIG).unlink()
    assert "has no adapter_config.json" in early(saved)


@pytest.mark.parametrize("content", [b'{"r": 4,', b"\xff\xfe", b"[" * 100_000], ids=["cut", "not UTF-8", "nested"])
def test_config_that_is_no_json(saved: Path, content: bytes) -> None:
    (saved / CONFIG).write_bytes(content)
    assert "cannot be read as JSON" in early(saved)


def test_adapters_in_directories_of_their_names_are_named(saved: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(saved, saved.parent / "several" / name)
    words = "has no adapter_config.json: expected what finetune or PEFT saves; there is one in each of one, two: name"
    assert words in early(saved.parent / "several")
    check_path(LoRAConfig(path=str(saved.parent / "several" / "two")))


def test_config_that_is_no_object(saved: Path) -> None:
    (saved / CONFIG).write_text("[1]")
    assert "holds a list: expected an object" in early(saved)


def test_missing_weights(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in early(saved)


def test_a_pickle_is_never_read(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    message = early(saved)
    assert "adapter_model.bin is a pickle, which is never read" in message
    assert refused(saved) == message


@pytest.mark.parametrize("size", [0, 7, 200])
def test_truncated_weights(saved: Path, size: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    assert f"{WEIGHTS} cannot be read" in early(saved)
    assert f"{WEIGHTS} cannot be read" in refused(saved)


def test_missing_tensor(saved: Path) -> None:
    key = change(saved, "layers.1.self_attn.v_proj.lora_B.weight", None)
    assert f"{key} is missing (expected 32 x 4)" in refused(saved)


def test_unexpected_tensor(saved: Path) -> None:
    change(saved, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64))
    assert "layers.9.self_attn.q_proj.lora_A.weight is unexpected (4 x 64)" in refused(saved)


def test_misshaped_tensor(saved: Path) -> None:
    change(saved, "layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 63))
    assert "q_proj.lora_A.weight is 4 x 63, expected 4 x 64" in refused(saved)


def test_wrong_rank_is_called_that(saved: Path) -> None:
    change(saved, "layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(6, 64))
    assert "is 6 x 64, expected 4 x 64 (rank 6 in the file, 4 here)" in refused(saved)


def test_every_tensor_wrong_lists_five(saved: Path) -> None:
    message = refused(edit(saved, r=8))
    assert message.count("(rank 4 in the file, 8 here)") == 5
    assert message.endswith("and 3 more")


def test_not_finite(saved: Path) -> None:
    change(saved, "layers.0.self_attn.q_proj.lora_A.weight", torch.full((4, 64), torch.nan))
    assert "values that are not finite" in refused(saved)


def test_not_floating_point(saved: Path) -> None:
    change(saved, "layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64, dtype=torch.int32))
    assert "expected a floating point tensor" in refused(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "is of method IA3: expected LORA"),
        ({"use_dora": True}, "has use_dora=true"),
        ({"bias": "some"}, "bias is 'some': expected none | all | lora_only"),
        ({"lora_bias": 1}, "lora_bias is 1: expected true or false"),
        ({"lora_bias": True}, "q_proj.lora_B.bias is missing (expected 64)"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices is [1, 1]: expected tokens, each once"),
        ({"trainable_token_indices": [1, 2]}, "token_adapter.trainable_tokens_delta is missing (expected 2 x 64)"),
        (
            {"trainable_token_indices": [96]},
            "trains token 96 of model.embed_tokens, which has 96 here: resize the base",
        ),
        ({"trainable_token_indices": {"wte": [1]}}, "trains tokens of wte, which this model does not have"),
        ({"trainable_token_indices": {"norm": [1]}}, "norm, which is no table of them here: LlamaRMSNorm"),
        ({"layers_pattern": "("}, "layers_pattern is '(': expected a list of names or a regular expression"),
        ({"something_of_2027": {"a": 1}}, "sets something_of_2027={'a': 1}"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base"),
        ({"r": 0}, "r is 0: expected a rank of at least 1"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 65}, "adapter.rank is 65"),
        ({"lora_alpha": None}, "lora_alpha is None: expected a number above 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']: expected ranks by name"),
        ({"rank_pattern": {"q_proj(": 3}}, "rank_pattern is"),
        ({"target_modules": "("}, "target_modules is '(': expected a list of names or a regular expression"),
        ({"target_modules": [3]}, "target_modules is [3]"),
        ({"target_modules": ["w1", "w2"]}, "adapts w1, w2, of which this model has nothing: have down_proj"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is unexpected"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj.lora_A.weight is missing"),
        ({"modules_to_save": ["scorer"]}, "'scorer' matches no module"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing (expected 96 x 64)"),
    ],
)
def test_settings_that_do_not_fit(saved: Path, values: dict, message: str) -> None:
    assert message in refused(edit(saved, **values), UserError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "adapter.rank is 8, but the adapter"),
        ({"alpha": 3.0}, "adapter.alpha is 3.0, but the adapter"),
        ({"rslora": True}, "adapter.rslora is True, but the adapter"),
        ({"targets": ["q_proj"]}, "adapter.targets is ['q_proj'], but the adapter"),
        ({"train_also": ["lm_head"]}, "adapter.train_also is ['lm_head'], but the adapter"),
    ],
)
def test_settings_of_ones_own_that_contradict_the_file(saved: Path, settings: dict, message: str) -> None:
    line = refused(saved, ConfigError, **settings)
    assert message in line
    assert str(saved) in line
    if settings.keys() & {"rank", "alpha", "rslora"}:
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_path(LoRAConfig(path=str(saved), **settings))


def test_what_peft_can_and_we_cannot_is_said_before_a_model_is_loaded(saved: Path) -> None:
    assert "has use_dora=true" in early(edit(saved, use_dora=True))
    assert "is of method PREFIX_TUNING" in early(edit(saved, peft_type="PREFIX_TUNING"))


def test_settings_that_agree_with_the_file(saved: Path) -> None:
    model = frozen("llama")
    adapter = attach(model, LoRAConfig(path=str(saved), rank=4, alpha=8.0, targets=["*.[qv]_proj"], dropout=0.2))
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.dropout) == (4, 8.0, 0.2)
    wanted, _ = lora("llama", targets=["q_proj", "v_proj"])
    assert torch.equal(logits(model), logits(wanted))


def test_an_adapter_of_another_family(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"adapts q_proj, v_proj, of which this model has nothing: have c_attn"):
        attach(frozen("gpt2"), LoRAConfig(path=str(saved)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "has rank 4 and alpha 8 for model.layers.0.self_attn.q_proj, but it is attached with rank 8"),
        ({"alpha": 16.0}, "has rank 4 and alpha 8 for .* but it is attached with rank 4 and alpha 16"),
        ({"rslora": True}, "has rslora False, but it is attached with True"),
    ],
)
def test_loading_into_an_adapter_of_other_settings(saved: Path, settings: dict, message: str) -> None:
    _, adapter = lora("llama", targets=["q_proj", "v_proj"], **settings)
    with pytest.raises(ModelError, match=message):
        adapter.load(saved)


def test_two_values_for_one_tied_tensor(tmp_path: Path) -> None:
    _, adapter = lora("llama", tied=False, train_also=["lm_head", "embed_tokens"])
    adapter.save(tmp_path)
    with pytest.raises(ModelError, match=r"different values for .*embed_tokens.* and .*lm_head"):
        attach(frozen("llama", tied=True), LoRAConfig(path=str(tmp_path)))


def test_the_adapter_that_fails_to_load_changes_nothing(saved: Path) -> None:
    model, adapter = lora("llama", targets=["q_proj", "v_proj"])
    before = logits(model)
    change(saved, "layers.1.self_attn.v_proj.lora_B.weight", torch.zeros(32, 5))
    with pytest.raises(ModelError):
        adapter.load(saved)
    assert torch.equal(logits(model), before)


DIGESTS = {"base": "b" * 64, "tokenizer": "t" * 64, "chat_template": "c" * 64, "quantization": "q" * 64}
NF4 = {"name": "nf4", "block_size": 64, "double_quant": True}


def provenance(directory: Path, **values: str | None) -> Path:
    directory.mkdir(exist_ok=True)
    write_provenance(directory, DIGESTS | values, method="lora", base="org/base", quantization=NF4)
    return directory


def test_the_same_base_is_accepted_in_silence(tmp_path: Path) -> None:
    assert check_provenance(provenance(tmp_path), DIGESTS) == []


def test_an_adapter_without_provenance_is_accepted_aloud(tmp_path: Path) -> None:
    (note,) = check_provenance(tmp_path, DIGESTS)
    assert "has no finetune.json" in note


def test_other_weights_are_refused_with_the_difference(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"other weights: base x{12} \(org/base\), loaded b{12}; set model\.path"):
        check_provenance(provenance(tmp_path, base="x" * 64), DIGESTS, allow_other_quant=True)


def test_another_quantization_is_refused_unless_allowed(tmp_path: Path) -> None:
    directory = provenance(tmp_path, quantization="x" * 64)
    with pytest.raises(ModelError, match=r"another quantization: x{12}, loaded q{12}; .*allow_other_quant=true"):
        check_provenance(directory, DIGESTS)
    with pytest.raises(ModelError, match=r"another quantization: block_size=64; loaded block_size=128; set quant"):
        check_provenance(directory, DIGESTS, quantization=NF4 | {"block_size": 128})
    (note,) = check_provenance(directory, DIGESTS, allow_other_quant=True)
    assert "another quantization" in note


@pytest.mark.parametrize("key", ["tokenizer", "chat_template"])
def test_another_tokenizer_or_template_is_said(tmp_path: Path, key: str) -> None:
    (note,) = check_provenance(provenance(tmp_path, **{key: "x" * 64}), DIGESTS)
    assert f"another {key.replace('_', ' ')}: x" in note


def test_a_digest_that_one_side_lacks_is_not_compared(tmp_path: Path) -> None:
    assert check_provenance(provenance(tmp_path, chat_template=None), DIGESTS) == []
    assert check_provenance(tmp_path, {"base": DIGESTS["base"]}) == []


def test_a_newer_format_is_refused_by_name(saved: Path) -> None:
    provenance(saved)
    document = json.loads((saved / "finetune.json").read_text()) | {"format_version": FORMAT_VERSION + 1}
    (saved / "finetune.json").write_text(json.dumps(document))
    assert f"format_version {FORMAT_VERSION + 1}, newer than {FORMAT_VERSION}" in early(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": "1", "digests": {}}'])
def test_a_broken_provenance_is_refused(saved: Path, text: str) -> None:
    (saved / "finetune.json").write_text(text)
    assert "finetune.json" in early(saved)


def test_the_committed_sample_of_format_1_loads(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "copy")
    assert check_provenance(tmp_path / "copy", DIGESTS) == []
    adapter = attach(frozen("llama"), LoRAConfig(path=str(tmp_path / "copy")))
    values = {name: p.detach().double().sum().item() for name, p in adapter.trainable().items()}
    wanted = json.loads((SAMPLE / "sums.json").read_text())
    assert values == pytest.approx(wanted)
