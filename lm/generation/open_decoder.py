"""Which decoder a run is decoded with: the same choice for the command line, the library, the API and the page.

native kernel (CPU)   where the model has one, the install has them, and no other device is asked for
torch                 else: any model, any device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lm.errors import DeviceError
from lm.generation.decoder import Decoder
from lm.generation.kernel_decoder import KernelDecoder
from lm.kernels.compiled import compiled, native
from lm.kernels.decoding import Arrays, DecodePrecision
from lm.registry import KERNELS

if TYPE_CHECKING:
    from lm.models.base import LanguageModel

STATE_BYTES = 2 << 30
"""Memory for the states of all slots unless said otherwise."""


def has_kernel(model_type: str, device: str | None = None) -> bool:
    """Whether a model of this type is decoded natively on `device`; imports no torch."""
    return device in (None, "cpu") and model_type in KERNELS.names() and native() is not None


def open_decoder(
    options: Mapping[str, Any],
    arrays: Callable[[], Arrays],
    model: Callable[[], LanguageModel],
    *,
    device: str | None = None,
    precision: DecodePrecision = "fp32",
    max_slots: int = 1,
    state_bytes: int = STATE_BYTES,
    threads: int | None = None,
) -> Decoder:
    """The decoder of one model.

    Args:
        options: the model's options as `config.json` spells them out, with `type`.
        arrays: gives its weights; called for a native decoder.
        model: gives the torch model; called where torch decodes.
        device: None or "cpu" takes the native kernel where there is one.
        precision: of the weights; int8 only natively.
        max_slots: texts held at once, fewer where `state_bytes` does not hold as many.
        state_bytes: memory for the states of all slots.
        threads: of the native kernel; None takes OMP_NUM_THREADS or the cores at hand.

    Raises:
        DeviceError: int8 without a kernel, or memory too small for the state of one text.
    """
    kind = str(options["type"])
    lacks = KERNELS.resolve(kind).lacks(options) if has_kernel(kind, device) else None
    if lacks or not has_kernel(kind, device):
        if precision == "int8":
            why = f"they do not have {lacks}" if lacks else _why_not(kind, device)
            raise DeviceError(f"int8 weights need the native kernels: {why}. Use fp32.")
        from lm.generation.torch_decoder import TorchDecoder

        return TorchDecoder(model())
    cls = KERNELS.resolve(kind)
    one = cls.slot_bytes(options)
    slots = min(max_slots, state_bytes // max(one, 1))
    if slots < 1:
        raise DeviceError(
            f"The state of one text takes {one / 2**20:,.0f} MB, more than the {state_bytes / 2**20:,.0f} MB set aside "
            "for states: set more aside with --state-memory of lm serve, or state_bytes in Python."
        )
    return KernelDecoder(cls(options, arrays(), slots=slots, precision=precision, threads=threads), slots, precision)


def _why_not(kind: str, device: str | None) -> str:
    if device not in (None, "cpu"):
        return f"they run on the CPU, not on {device}"
    if kind not in KERNELS.names():
        return f"a {kind} has none"
    if compiled() is not None:
        return "INKLING_NATIVE=0 turns them off"
    return "this install has none (no C++ compiler was found when it was made)"
