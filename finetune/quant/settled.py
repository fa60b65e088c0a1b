"""Parts of a block that are finished are not run again: what their last projection reads is kept.

Once the projections of a block's attention are quantized, nothing changes any more what it puts out. The runs on which
the rest of the block is calibrated, and the last one, multiply what is kept by the last projection and go on from
there. That a part puts out what its last projection does, and nothing beside, is seen in a run, not assumed; a part of
which that is not so, or that would take too much room, is run like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from finetune.quant.replay import Sink

Forward = Callable[[], Iterator[Tensor]]
Keep = Callable[[str, Iterator[Tensor]], Sink]
MOST_BYTES = 1 << 30
"""Of what one projection reads, that are kept while its block is worked on."""


class _End(NamedTuple):
    """A part that puts out what a projection in it does.

    Attributes:
        path: of the part within the block.
        others: how many times it puts out None beside; None for the hidden states alone.
        bytes: that the projection reads in one run.
    """

    path: str
    others: int | None
    bytes: int


class _StandIn(nn.Module):
    """Takes the place of a part: puts out what its last projection makes of what is kept."""

    def __init__(self, part: nn.Module, projection: nn.Module, others: int | None, sink: Sink) -> None:
        super().__init__()
        self.__dict__["part"] = part  # not as a child: nobody looks for projections in it any more
        self.__dict__["projection"] = projection
        self.others, self.sink = others, sink
        self.kept: Iterator[Tensor] = iter(())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__["projection"](next(self.kept))
        return hidden if self.others is None else (hidden, *[None] * self.others)

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
        batches: how many there are.
        keep: keeps what is read, given a name for it.
    """

    def __init__(
        self, block: nn.Module, name: str, names: Iterable[str], forward: Forward, batches: int, keep: Keep
    ) -> None:
        self.block, self.forward, self.batches, self.keep = block, forward, batches, keep
        self.prefix = f"{name}."
        self.paths = {each.removeprefix(self.prefix) for each in names}
        self._ends: dict[str, _End] = {}
        self._done: set[str] = set()
        self._read: dict[str, Sink] = {}
        self._places: list[tuple[str, nn.Module, _StandIn]] = []

    def rehearse(self) -> None:
        """Run the block once, and see which parts of it end in which projection."""
        calls: dict[str, list[tuple[Any, Any]]] = {}

        def note(path: str) -> Callable[..., None]:
            return lambda _module, args, output: calls.setdefault(path, []).append((args, output))

        handles = [m.register_forward_hook(note(path)) for path, m in self.block.named_modules() if path]
        try:
            next(self.run())
        finally:
            for handle in handles:
                handle.remove()
        once = {path: found[0] for path, found in calls.items() if len(found) == 1}
        for path in self.paths & once.keys():
            args, own = once[path]
            for part, (_, output) in once.items():
                form = _form(own, output) if path.startswith(f"{part}.") else None
                if form is not None and args and isinstance(args[0], Tensor):
                    best = self._ends.get(path)
                    if best is None or len(part) < len(best.path):
                        self._ends[path] = _End(part, form[0], args[0].numel() * args[0].element_size())

    def gather(self, reader: str | None) -> None:
        """Run the block over all batches.

        Args:
            reader: a projection; what it reads is kept where a part ends in it. It comes before whatever is not
                quantized yet, and is about to be. None for no such one.
        """
        path = (reader or "").removeprefix(self.prefix)
        end = self._ends.get(path)
        if end is None or end.bytes * self.batches > MOST_BYTES:
            for _ in self.run():
                pass
            return
        seen: list[Tensor] = []

        def read() -> Iterator[Tensor]:
            for _ in self.run():
                if seen:
                    yield seen.pop()

        module = self.block.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]), prepend=True)
        try:
            sink = self.keep(f"read{len(self._places)}", read())
        finally:
            handle.remove()
        if len(sink) == self.batches:
            self._read[path] = sink

    def done(self, names: Iterable[str]) -> None:
        """These projections are quantized."""
        paths = {name.removeprefix(self.prefix) for name in names}
        self._done |= paths
        for path in paths & self._read.keys():
            end = self._ends[path]
            if {each for each in self.paths if each.startswith(f"{end.path}.")} <= self._done:
                part, projection = self.block.get_submodule(end.path), self.block.get_submodule(path)
                stand_in = _StandIn(part, projection, end.others, self._read[path])
                self._places.append((end.path, part, stand_in))
                self._put(end.path, stand_in)

    def run(self) -> Iterator[Tensor]:
        """As `forward`, going on from what is kept."""
        for _, _, stand_in in self._places:
            stand_in.kept = iter(stand_in.sink)
        return self.forward()

    def undo(self) -> None:
        """Have every part in its place, the outer before those within."""
        for path, part, _ in reversed(self._places):
            self._put(path, part)
        self._places.clear()

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.block.get_submodule(parent), leaf, module)


def _form(own: Any, output: Any) -> tuple[int | None] | None:
    """How often None stands beside what a projection put out in the output of a part; None where it is another."""
    others = None
    if isinstance(output, tuple) and output and all(other is None for other in output[1:]):
        output, others = output[0], len(output) - 1
    if not isinstance(output, Tensor) or not isinstance(own, Tensor):
        return None
    same = output.data_ptr() == own.data_ptr() and output.shape == own.shape and output.stride() == own.stride()
    return (others,) if same else None
