"""Open an export in its own runtime and write down what it predicts. Runs alone: `python -I proof_client.py REQUEST`.

The interpreter is a fresh one, and this file makes sure that no module of finetune can be imported in it, so what it
finds is what a stranger with stock transformers, PEFT and bitsandbytes finds. It decides nothing: it writes
log-probabilities, losses and token ids; the process that asked compares them (finetune/export/verify.py).

REQUEST is a JSON file; `answer` in it names the directory that receives `answer.json` and one safetensors file a batch.

Shape suffixes: B rows of a batch, S positions, P learnt positions, V vocabulary.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORBIDDEN = "finetune"
IGNORE = -100


class _Refuse(importlib.abc.MetaPathFinder):
    """Makes the package under proof impossible to import, even where it is installed in this interpreter."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == FORBIDDEN:
            raise ModuleNotFoundError(f"the proof runs without {FORBIDDEN}, so {fullname} cannot be imported")


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refuse())

import torch  # noqa: E402  nothing may be imported before the refusal stands
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

LOADERS: dict[str, Any] = {}


def loader(name: str) -> Any:
    """Register how a kind of artefact is opened."""

    def keep(function: Any) -> Any:
        LOADERS[name] = function
        return function

    return keep


def options(request: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told besides the path."""
    chosen = {"dtype": request["dtype"], "device_map": {"": request["device"]}}
    return chosen | ({"trust_remote_code": True} if request.get("trust_remote_code") else {})


def plain(head: dict[str, Any]) -> dict[str, Any]:
    """Settings of a head as transformers takes them: JSON has made texts of the numbers of its classes."""
    return head | ({"id2label": {int(key): name for key, name in head["id2label"].items()}} if head else {})


@loader("checkpoint")
def load_checkpoint(request: dict[str, Any], path: str) -> Any:
    """A checkpoint directory, as `AutoModelForCausalLM`, or what else the task asks for, opens it."""
    auto = getattr(transformers, request["auto_class"])
    found: Any = auto.from_pretrained(path, output_loading_info=True, **options(request))
    model, info = found
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise SystemExit(f"{path}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
    return model


@loader("peft")
def load_peft(request: dict[str, Any], path: str) -> Any:
    """An adapter directory, as PEFT opens it on its base, quantized as it was trained on."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install 'finetune-kit[export]', then prove it again") from error

    chosen = options(request)
    own_code = bool(request.get("trust_remote_code"))
    stored = AutoConfig.from_pretrained(request["base"], trust_remote_code=own_code, **plain(request["head"]))
    if request["head"]:
        chosen["config"] = stored
    if request.get("key_mapping"):
        chosen["key_mapping"] = request["key_mapping"]
    if request.get("base_quantization") and getattr(stored, "quantization_config", None) is None:
        chosen["quantization_config"] = BitsAndBytesConfig.from_dict(request["base_quantization"])
    auto = getattr(transformers, request["auto_class"])
    model = PeftModel.from_pretrained(auto.from_pretrained(request["base"], **chosen), path)
    # PEFT only warns where a key of the file fits nothing, and the adapter then changes nothing.
    placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = sorted(set(load_file(Path(path) / "adapter_model.safetensors")) - set(placed))
    if lost:
        raise SystemExit(f"{path}: PEFT finds no place for {lost[:3]}")
    return model


def widen(model: Any) -> None:
    """Compute in float32 whatever the weights are stored in.

    Not by `dtype=float32` on loading: transformers 5.23 then leaves every `.weight` of a bitsandbytes checkpoint in its
    stored dtype and casts the rest, which does not compute. Packed weights are integers and stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def batches(rows: dict[str, torch.Tensor], plan: list[list[int]], pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches of the held-out rows, in the order asked for."""
    offsets = rows["offsets"].tolist()
    for chosen in plan:
        if "sources" in rows:
            yield pair_batch(rows, chosen, pad_id)
            continue
        cuts = [slice(offsets[row], offsets[row + 1]) for row in chosen]
        width = max(cut.stop - cut.start for cut in cuts)
        ids_BS = torch.full((len(cuts), width), pad_id, dtype=torch.int64)
        labels_BS = torch.full((len(cuts), width), IGNORE, dtype=torch.int64)
        mask_BS = torch.zeros((len(cuts), width), dtype=torch.int64)
        for line, cut in enumerate(cuts):
            length = cut.stop - cut.start
            ids_BS[line, :length] = rows["input_ids"][cut]
            labels_BS[line, :length] = rows["labels"][cut]
            mask_BS[line, :length] = 1
        batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS}
        if "targets" in rows:
            batch["targets"] = rows["targets"][chosen]
        if "token_types" in rows:
            batch["token_type_ids"] = torch.zeros_like(ids_BS)
            for line, cut in enumerate(cuts):
                batch["token_type_ids"][line, : cut.stop - cut.start] = rows["token_types"][cut]
        yield batch


def pair_batch(rows: dict[str, torch.Tensor], chosen: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    """What an encoder reads, and the labels over which its decoder's logits stand, each padded by itself."""
    pad = torch.nn.utils.rnn.pad_sequence
    read, written = [], []
    for row in chosen:
        start, stop = rows["offsets"][row].item(), rows["offsets"][row + 1].item()
        middle = start + rows["sources"][row].item()
        read.append(rows["input_ids"][start:middle])
        written.append(rows["labels"][middle:stop])
    ids_BS, labels_BT = pad(read, True, pad_id), pad(written, True, IGNORE)
    mask_BS = pad([torch.ones_like(ids) for ids in read], True, 0)
    return {"input_ids": ids_BS, "labels": labels_BT, "attention_mask": mask_BS}


@torch.no_grad()
def observe(model: Any, request: dict[str, Any], answer: Path) -> None:
    """Write, a file a batch: losses at every learnt position, log-probabilities at every `stride`-th; both float32."""
    seen, stride = 0, request["stride"]
    for number, batch in enumerate(batches(load_file(request["rows"]), request["plan"], request["pad_id"])):
        labels_BS = batch.pop("labels")
        if "targets" in batch:
            save_file(judged(model, batch, request), answer / f"batch-{number:05d}.safetensors")
            continue
        if model.config.is_encoder_decoder:
            batch["labels"] = targets_BS = labels_BS  # of which the model makes what its decoder reads
        else:
            targets_BS = torch.full_like(labels_BS, IGNORE)
            targets_BS[:, :-1] = labels_BS[:, 1:]
        learnt_BS = targets_BS != IGNORE
        moved = {name: tensor.to(request["device"]) for name, tensor in batch.items()}
        # PEFT gives logits for virtual tokens as well, before those of the text.
        logits_BSV = model(**moved, use_cache=False).logits[:, -labels_BS.shape[1] :]
        logits_PV = logits_BSV[learnt_BS.to(request["device"])].float().cpu()
        targets_P = targets_BS[learnt_BS]
        losses_P = torch.nn.functional.cross_entropy(logits_PV, targets_P, reduction="none")
        kept = (torch.arange(seen, seen + len(targets_P)) % stride) == 0
        log_probs_PV = torch.log_softmax(logits_PV[kept], -1)
        save_file({"losses": losses_P, "log_probs": log_probs_PV}, answer / f"batch-{number:05d}.safetensors")
        seen += len(targets_P)


@torch.no_grad()
def judged(model: Any, batch: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Losses of rows that are judged as a whole; log-probabilities of their classes, or the numbers given to them."""
    targets_B = batch.pop("targets")
    moved = {name: tensor.to(request["device"]) for name, tensor in batch.items()}
    logits_BC = model(**moved).logits.float().cpu()
    if targets_B.is_floating_point():
        return {"losses": (logits_BC[:, 0] - targets_B) ** 2, "log_probs": logits_BC}
    log_probs_BC = torch.log_softmax(logits_BC, -1)
    return {"losses": -log_probs_BC.gather(1, targets_B[:, None])[:, 0], "log_probs": log_probs_BC}


def tokenizer_facts(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """What the artefact's own tokenizer makes of the texts and conversations asked about."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=bool(request.get("trust_remote_code")))
    chats = None
    if tokenizer.chat_template:
        chats = [
            tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=prompt)
            for chat in request["chats"]
            for prompt in (False, True)
        ]
    return {
        "texts": [tokenizer.encode(text) for text in request["texts"]],
        "chats": chats,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "vocabulary": len(tokenizer),
    }


@torch.no_grad()
def generate(model: Any, request: dict[str, Any]) -> list[int]:
    """The greedy continuation of one prompt, through the runtime's own generation."""
    prompt_BS = torch.tensor([request["prompt"]], device=request["device"])
    made = model.generate(
        input_ids=prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=request["new_tokens"],
        do_sample=False,
        pad_token_id=request["pad_id"],
    )
    return made[0, 1 if model.config.is_encoder_decoder else prompt_BS.shape[1] :].tolist()


def main(path: str) -> None:
    """Answer one request."""
    request = json.loads(Path(path).read_text("utf-8"))
    answer = Path(request["answer"])
    facts = tokenizer_facts(request["directory"], request)
    model = LOADERS[request["loader"]](request, request["directory"]).eval()
    if request["widen"]:
        widen(model)
    observe(model, request, answer)
    if request["head"]:
        facts["classes"] = list(model.config.id2label.values())
    else:
        generation = getattr(model, "generation_config", None)
        facts |= {
            "continuation": generate(model, request),
            "generation_eos": getattr(generation, "eos_token_id", None),
        }
    loaded = [name for name in sys.modules if name.partition(".")[0] == FORBIDDEN]
    if loaded:
        raise SystemExit(f"{FORBIDDEN} was imported in its own proof: {loaded[:3]}")
    (answer / "answer.json").write_text(json.dumps(facts), "utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1])
