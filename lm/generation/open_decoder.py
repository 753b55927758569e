"""Chooses the decoder of a model, for the command line, the library, the API and the page.

native kernel   on the CPU, if the model type has a kernel and this install has the native kernels
torch           for any other model or device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lm.errors import DeviceError
from lm.generation.decoder import Decoder
from lm.generation.kernel_decoder import KernelDecoder
from lm.generation.options import JoinedDecoding
from lm.kernels.compiled import compiled, native
from lm.kernels.decoding import Arrays, DecodePrecision
from lm.registry import KERNELS

if TYPE_CHECKING:
    from lm.models.base import LanguageModel

STATE_BYTES = 2 << 30
"""Default memory for the states of all slots."""


def has_kernel(model_type: str, device: str | None = None) -> bool:
    """Whether a native kernel decodes this model type on `device`. Does not import torch."""
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
    joined: JoinedDecoding = "auto",
) -> Decoder:
    """Open the decoder of a model.

    Args:
        options: the model options of `config.json`, with `type`.
        arrays: returns the weights; called for a native kernel.
        model: returns the torch model; called for a torch decoder.
        device: None or "cpu" uses the native kernel if there is one.
        precision: of the weights; bf16, int8 and int4 need a native kernel, int4 that of a Transformer.
        max_slots: texts at once; fewer if `state_bytes` is too small for all.
        state_bytes: memory for the states of all slots.
        threads: of the native kernel; None: OMP_NUM_THREADS, or the available cores.
        joined: of a torch decoder; a native kernel steps all slots in one call, with the same bits in any company.

    Raises:
        DeviceError: the precision needs a kernel that is not there, or `state_bytes` is too small for one text.
    """
    kind = str(options["type"])
    cls = KERNELS.resolve(kind) if has_kernel(kind, device) else None
    lacks = cls and cls.lacks(options)
    if cls is None or lacks:
        if precision != "fp32":
            reason = f"they do not have {lacks}" if lacks else _reason_without_kernel(kind, device)
            raise DeviceError(f"{precision} weights need the native kernels: {reason}. Use fp32.")
        from lm.generation.torch_decoder import TorchDecoder

        return TorchDecoder(model(), joined={"auto": None, "on": True, "off": False}[joined])
    if precision not in cls.precisions:
        raise DeviceError(
            f"{kind} models have no {precision} weights, only transformer models have them: use "
            f"{' or '.join(cls.precisions[::-1])}."
        )
    slot_bytes = cls.slot_bytes(options)
    slots = min(max_slots, state_bytes // max(slot_bytes, 1))
    if slots < 1:
        raise DeviceError(
            f"The state of one text needs {slot_bytes / 2**20:,.0f} MB, and only {state_bytes / 2**20:,.0f} MB are "
            "reserved for states: reserve more with --state-memory of lm serve, or state_bytes in Python."
        )
    return KernelDecoder(cls(options, arrays(), slots=slots, precision=precision, threads=threads), slots, precision)


def _reason_without_kernel(kind: str, device: str | None) -> str:
    if device not in (None, "cpu"):
        return f"they run on the CPU, not on {device}"
    if kind not in KERNELS.names():
        return f"a {kind} has none"
    if compiled() is not None:
        return "INKLING_NATIVE=0 turns them off"
    return "this install has none (it was built without GCC or Clang)"
