"""Parts of a block that are finished: what they put out is kept, and later runs of the block need not compute it again.

Once all projections of a block's attention are quantized, nothing changes any more what it puts out: the runs on which
the rest of the block is calibrated, and the last one, take it from where it is kept. Which parts are finished follows
from names. That a part is run once, before what is still to be quantized, and puts out hidden states and nothing else
is seen, not assumed: a part of which that is not so is run again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from finetune.quant.replay import Sink

Forward = Callable[[], Iterator[Tensor]]
Keep = Callable[[str, Iterator[Tensor]], Sink]


class _StandIn(nn.Module):
    """Takes the place of a part: notes what it puts out, or gives what it put out before."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__["part"] = part  # not as a child: nobody looks for projections in it any more
        self.put_out: list[Any] = []
        self.others: int | None = None
        self.kept: Iterator[Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is not None:
            hidden = next(self.kept).clone()  # whoever adds to it in place adds to his own
            return hidden if self.others is None else (hidden, *[None] * self.others)
        output = self.__dict__["part"](*args, **kwargs)
        self.put_out.append(output.clone() if isinstance(output, Tensor) else output)
        return output

    def taken(self, like: Tensor) -> Tensor | None:
        """The hidden states that were put out since it was last asked; None unless once, and nothing else with them."""
        outputs, self.put_out = self.put_out, []
        if len(outputs) != 1:
            return None
        hidden, others = outputs[0], None
        if isinstance(hidden, tuple) and hidden and all(other is None for other in hidden[1:]):
            hidden, others = hidden[0], len(hidden) - 1
        if not isinstance(hidden, Tensor) or hidden.shape != like.shape:
            return None
        self.others = others
        return hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["part"], name)


class Settled:
    """The finished parts of one block.

    Args:
        block: its projections are in their places.
        name: of it.
        names: of its projections, which begin with its own.
        forward: runs it over all batches, one a step.
        keep: keeps hidden states, given a name for them.
    """

    def __init__(self, block: nn.Module, name: str, names: Iterable[str], forward: Forward, keep: Keep) -> None:
        self.block, self.name, self.names, self.forward, self.keep = block, name, set(names), forward, keep
        self._done: set[str] = set()
        self._kept: list[tuple[_StandIn, Sink]] = []
        self._places: list[tuple[str, nn.Module]] = []

    def done(self, names: Iterable[str]) -> None:
        """Projections that are quantized."""
        self._done.update(names)

    def gather(self, ordered: bool) -> None:
        """Run the block over all batches.

        Args:
            ordered: what is run comes before whatever is not quantized.
        """
        path = self._finished() if ordered else None
        if path is None:
            for _ in self.run():
                pass
            return
        part, odd = self.block.get_submodule(path), False
        stand_in = _StandIn(part)

        def put_out() -> Iterator[Tensor]:
            nonlocal odd
            for hidden in self.run():
                found = stand_in.taken(hidden)
                odd |= found is None
                if found is not None:
                    yield found

        self._put(path, stand_in)
        sink = self.keep(f"part{len(self._places)}", put_out())
        self._places.append((path, part))
        if odd:
            self._put(path, part)
        else:
            self._kept.append((stand_in, sink))

    def run(self) -> Iterator[Tensor]:
        """As `forward`, with what is kept."""
        for stand_in, sink in self._kept:
            stand_in.kept = iter(sink)
        return self.forward()

    def undo(self) -> None:
        """Have every part in its place, the outer before those within."""
        for path, part in reversed(self._places):
            self._put(path, part)
        self._kept.clear()

    def _finished(self) -> str | None:
        """A part that several projections are in, all of them quantized, that was not tried before."""
        tried = [path for path, _ in self._places]
        for path, _ in self.block.named_modules():
            under = {name for name in self.names if name.startswith(f"{self.name}.{path}.")}
            if path and path not in tried and len(under) > 1 and under <= self._done:
                return path
        return None

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.block.get_submodule(parent), leaf, module)
