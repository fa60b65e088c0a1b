"""Endings as PEFT matches them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.peft_format import ends, shorten

parts = st.sampled_from(["a", "b", "q", "qq"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.sets(names, min_size=1, max_size=8), st.data(), st.integers(1, 2))
def test_the_endings_written_mean_exactly_the_chosen_names(every: set[str], data: st.DataObject, parts: int) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(every)), min_size=1))
    endings = shorten(chosen, every, parts)
    selected = {name for name in every if ends(name, endings)}
    # a whole name that is the ending of another one selects that as well; nothing shorter could tell them apart
    torn = any(other.endswith(f".{name}") for name in chosen for other in every - chosen)
    assert selected == chosen or (torn and selected > chosen)
