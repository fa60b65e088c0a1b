"""Where a run computes, when the same process has computed elsewhere before."""

from __future__ import annotations

import torch
from accelerate.state import PartialState
from pytest import MonkeyPatch

from finetune.device import make_accelerator


def test_a_device_settled_on_earlier_does_not_stay(monkeypatch: MonkeyPatch) -> None:
    make_accelerator("cpu")
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda:0"))
    assert make_accelerator("cpu").device == torch.device("cpu")


def test_accelerators_of_one_device_share_their_state() -> None:
    first, second = make_accelerator("cpu"), make_accelerator("cpu")
    assert first.device == second.device == torch.device("cpu")
    assert first.num_processes == 1
