"""The native decoder: the slots of a kernel as a Decoder."""

from __future__ import annotations

from collections.abc import Sequence

from lm.generation.decoder import Logits, Snapshot
from lm.kernels.decoding import Kernel


class KernelDecoder:
    """Decodes in the preallocated slots of a kernel, without torch."""

    def __init__(self, kernel: Kernel, slots: int, precision: str) -> None:
        self._kernel = kernel
        self._free = list(range(slots))[::-1]
        self.max_slots = slots
        self.name = f"native {precision}, {kernel.isa}"
        self.vocab_size = kernel.vocab_size
        self.context_length = kernel.context_length

    def open(self) -> int:
        """See `Decoder.open`."""
        slot = self._free.pop()
        self._kernel.clear(slot)
        return slot

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """See `Decoder.prefill`."""
        return self._kernel.read(slot, list(ids), only_last=only_last)

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """See `Decoder.step`."""
        return self._kernel.step(slots, ids)

    def fork(self, slot: int) -> int:
        """See `Decoder.fork`."""
        other = self._free.pop()
        self._kernel.copy(slot, other)
        return other

    def export(self, slot: int) -> Snapshot:
        """See `Decoder.export`."""
        arrays, window = self._kernel.save(slot)
        return Snapshot(arrays, frozenset(name for name in arrays if "." in name), window)

    def restore(self, snapshot: Snapshot) -> int:
        """See `Decoder.restore`."""
        slot = self.open()
        if snapshot.arrays:
            self._kernel.load(slot, snapshot.arrays, snapshot.window)
        return slot

    def close(self, slot: int) -> None:
        """See `Decoder.close`."""
        self._free.append(slot)
