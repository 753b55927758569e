"""Mixed precision: how much of a training computes in a low number format, and what keeps it exact beside that.

    level   weights   products   norms, softmax, loss   the optimizer's weights and moments
    O0      fp32      fp32 *     fp32                   fp32                               * or tf32
    O1      fp32      low        fp32 (autocast)        fp32
    O2      low       low        fp32                   fp32: master weights
    O3      low       low        low                    low

"low" is bf16 or fp16. A step, in the order of the calls:

    computing ─► backward (loss × scale) ─► collect (into fp32) ─► clip (÷ scale, norm) ─► step  or  overflow

At O2 the optimizer updates fp32 copies of the weights, and the model gets them rounded: updates that are small beside a
weight add up there, where a low weight would stay as it is. Modules named in `training.fp32_modules` stay in fp32 at
every level, and so do context tables, which are looked up and added but never multiplied.

Sources: Micikevicius et al. 2018 (mixed precision, master weights, loss scaling); the names of the levels are those of
NVIDIA's Apex.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lm.config import TrainingConfig
from lm.device import DTYPES, Precision, computing
from lm.errors import ConfigError, DeviceError
from lm.kernels.autograd import clip_grad_norm
from lm.kernels.dispatch import cast_floats, keep_in_fp32, usable_for_all
from lm.models.base import LanguageModel, whole
from lm.registry import did_you_mean
from lm.torch_private import foreach, sparse_rows
from lm.training.module_needs import module_needs

Level = Literal["O0", "O1", "O2", "O3"]
LOW: tuple[Precision, ...] = ("bf16", "fp16")
NORMS = (nn.RMSNorm, nn.LayerNorm)
LEAST_SCALE = 2.0**-4
"""A dynamic loss scale stops falling here; below 1 it is no longer what overflows."""
MOST_OVERFLOWS = 20
"""Steps in a row that a fixed loss scale may lose before it is no longer what overflows."""


# -- choosing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A number format, and how much of a training uses it."""

    precision: Precision
    level: Level

    @property
    def low(self) -> torch.dtype | None:
        """The low format; None at O0."""
        return DTYPES[self.precision] if self.precision in LOW else None

    @property
    def casts_weights(self) -> bool:
        """Whether the model's weights are low."""
        return self.level in ("O2", "O3")

    def __str__(self) -> str:
        return self.precision if self.level == "O0" else f"{self.precision} {self.level}"


def formats(device: torch.device) -> list[Format]:
    """All formats that a device computes in, the most exact first."""
    found = [Format("fp32", "O0")]
    if _lacks("tf32", device) is None:
        found.append(Format("tf32", "O0"))
    levels: tuple[Level, ...] = ("O1", "O2", "O3")
    found += [Format(precision, level) for precision in LOW if _lacks(precision, device) is None for level in levels]
    return found


def choose_format(config: TrainingConfig, device: torch.device) -> Format:
    """The format that the options ask for, or what the device does best.

    Raises:
        DeviceError: the device does not compute in it.
        ConfigError: a loss scale or fp32_modules make no sense with it.
    """
    precision, level = config.precision, config.amp
    if precision is None:
        fast: Precision = "bf16" if _lacks("bf16", device) is None else "fp16"
        low = device.type == "cuda" and fast == "bf16" if level is None else level != "O0"
        precision = fast if low else "fp32"
    if lack := _lacks(precision, device):
        every: tuple[Precision, ...] = ("fp32", "tf32", *LOW)
        others = [name for name in every if name != precision and _lacks(name, device) is None]
        raise DeviceError(f"--precision {precision}: {lack}; use {', '.join(others[:-1])} or {others[-1]}.")
    level = level or ("O1" if precision in LOW else "O0")
    if level == "O0" and config.loss_scale not in ("auto", None):
        raise ConfigError(
            f"--loss-scale {_short(config.loss_scale)} is for low precision, and this training is in {precision}: "
            "leave it out, or choose --precision fp16 or bf16."
        )
    if precision == "tf32" and config.fp32_modules:
        raise ConfigError("training.fp32_modules: tf32 is one switch for all products; use it with bf16 or fp16.")
    return Format(precision, level)


def _lacks(precision: Precision, device: torch.device) -> str | None:
    """Why a device does not compute in a format; None where it does."""
    cuda = device.type == "cuda"
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        return f"only NVIDIA GPUs from Ampere on compute in tf32, and this is {_named(device)}"
    # What torch emulates is slower than fp32.
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{_named(device)} does not compute in bf16"
    return None


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"


def _short(scale: str | float | None) -> str:
    return f"{scale:g}" if isinstance(scale, float) else str(scale)


# -- the loss scale -----------------------------------------------------------------------------------


class LossScale:
    """What the loss is multiplied by before backward; not torch's GradScaler, which refuses fp16 weights."""

    def __init__(self, config: TrainingConfig, precision: Precision) -> None:
        wanted = config.loss_scale
        if wanted == "auto":
            wanted = "dynamic" if precision == "fp16" else None
        self.dynamic = wanted == "dynamic"
        self.enabled = wanted is not None
        self.value = config.loss_scale_init if self.dynamic else float(wanted or 1.0)
        self._growth, self._backoff = config.loss_scale_growth, config.loss_scale_backoff
        self._window = config.loss_scale_window
        self._good = 0
        self._overflows = 0

    def note_good(self) -> None:
        """A step was made: after so many in a row a dynamic scale grows."""
        self._good, self._overflows = self._good + 1, 0
        if self.dynamic and self._good == self._window:
            self.value, self._good = self.value * self._growth, 0

    def note_overflow(self) -> bool:
        """A gradient was not finite: a dynamic scale falls. False where no scale is to blame any more."""
        self._good, self._overflows = 0, self._overflows + 1
        mends = self.value >= 1 if self.dynamic else self.enabled and self._overflows <= MOST_OVERFLOWS
        if self.dynamic:
            self.value = max(self.value * self._backoff, LEAST_SCALE)
        return mends

    def state(self) -> dict[str, float]:
        """All that resuming needs; empty without a scale."""
        return {"scale": self.value, "good_steps": self._good, "overflows": self._overflows} if self.enabled else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, also one of torch's GradScaler, which earlier versions kept."""
        if self.enabled:
            self.value = float(state["scale"])
            self._good = int(state["good_steps"] if "good_steps" in state else state["_growth_tracker"])
            self._overflows = int(state.get("overflows", 0))


# -- the level at work ----------------------------------------------------------------------------------


class MixedPrecision:
    """One level at work on one model, which it casts; the optimizers are made afterwards, with `masters`.

    Args:
        model: in fp32, on its device.
        config: precision, amp, fp32_modules and the loss scale's options.
        device: the model's.

    Raises:
        DeviceError, ConfigError: see `choose_format`; or a name in fp32_modules is none of the model's modules.
    """

    def __init__(self, model: LanguageModel, config: TrainingConfig, device: torch.device) -> None:
        self.device = device
        self.format = choose_format(config, device)
        self.scale = LossScale(config, self.format.precision)
        self.masters: dict[Tensor, Tensor] = {}
        """Of each low parameter that has one, the fp32 weights that the optimizer updates in its place."""
        self._model = model
        named = [_module(model, name) for name in config.fp32_modules]
        if self.format.level != "O0":
            self._arrange(named)

    @functools.cached_property
    def trained(self) -> list[Tensor]:
        """What the optimizers update, in the order of the model's parameters."""
        return [self.masters.get(parameter, parameter) for parameter in self._model.parameters()]

    # -- arranging the model ------------------------------------------------------------------------

    def _arrange(self, named: list[nn.Module]) -> None:
        level, low = self.format.level, self.format.low
        assert low is not None
        norms = [module for module in self._model.modules() if isinstance(module, NORMS)] if level == "O2" else []
        inner = {part for module in named for part in module.modules() if part is not module}
        outermost = [*named, *norms]
        for module in dict.fromkeys(outermost):
            # Around a module inside one that is in fp32 already, nothing has to be cast.
            if module not in inner:
                _compute_in_fp32(module, self.device, low if self.format.casts_weights else None)
        kept = {parameter for module in outermost for parameter in module.parameters()}
        for parameter in {parameter for module in named for parameter in module.parameters()}:
            keep_in_fp32(parameter)
        if self.format.casts_weights:
            self._cast(kept | {p for p, needs in module_needs(self._model).items() if needs.stays_fp32}, low)

    def _cast(self, kept: set[nn.Parameter], low: torch.dtype) -> None:
        for parameter in self._model.parameters():
            if parameter in kept:
                continue
            if self.format.level == "O2":
                self.masters[parameter] = parameter.detach().clone().requires_grad_()
            parameter.data = parameter.data.to(low)
        for module in self._model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
            if isinstance(module, LanguageModel) and self.format.level == "O3":
                module.loss_dtype = low
            if isinstance(module, nn.Embedding) and module.weight.dtype == low and self.device.type == "cpu":
                module.forward = functools.partial(_look_up, module)  # type: ignore[method-assign]

    # -- a step -------------------------------------------------------------------------------------

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """What a forward pass runs in."""
        return computing(self.device, self.format.precision, autocast=self.format.level == "O1")

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of the scaled objective to those that are there."""
        scaled = objective * self.scale.value if self.scale.enabled else objective
        # Backward casts nothing itself, but its products ask whether tf32 will do.
        with computing(self.device, "tf32" if self.format.precision == "tf32" else "fp32", autocast=False):
            scaled.backward()

    @torch.no_grad()
    def collect(self) -> None:
        """Move the gradients of low weights to their masters, in fp32: those of several batches are added up there."""
        for parameter, master in self.masters.items():
            if parameter.grad is None:
                continue
            gradient = (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def clip(self, most: float | None) -> float:
        """Take the loss scale out of the gradients, then clip them.

        Args:
            most: largest norm; None: no clipping.

        Returns:
            The norm before clipping; NaN or infinite where a gradient is, and nothing is clipped then.
        """
        with_gradient = [tensor for tensor in self.trained if tensor.grad is not None]
        gradients = [tensor.grad for tensor in with_gradient if tensor.grad is not None]
        values = [sparse_rows(gradient)[1] if gradient.is_sparse else gradient for gradient in gradients]
        if self.scale.enabled and values:
            # Clip true gradients: those of fp16 still carry the loss scale (65,536 at first).
            foreach("mul", values, 1 / self.scale.value)
        # Sparse gradients are those of context tables, whose steps are bounded by their own optimizer.
        dense = [tensor for tensor, gradient in zip(with_gradient, gradients, strict=True) if not gradient.is_sparse]
        sums = [values[at].sum(dtype=torch.float32) for at, each in enumerate(gradients) if each.is_sparse]
        if sums and not all(math.isfinite(float(each)) for each in sums):
            return math.nan
        most = math.inf if most is None else most
        slopes = [tensor.grad for tensor in dense if tensor.grad is not None]
        if usable_for_all("clip", slopes):
            return clip_grad_norm(slopes, most)
        # The squares of a low gradient may not be numbers of its format.
        total = torch.nn.utils.get_total_norm([slope.float() for slope in slopes])
        norm = float(whole(total))
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(dense, most, total)
        return norm

    def nonfinite_gradient(self) -> str:
        """Which gradient was the first that is not finite, on the way back."""
        pairs = [(name, self.masters.get(own, own).grad) for name, own in self._model.named_parameters()]
        for name, gradient in reversed(pairs):
            if gradient is not None:
                values = sparse_rows(gradient)[1] if gradient.is_sparse else gradient
                if not bool(torch.isfinite(whole(values)).all()):
                    return f"the gradient of {name}"
        return "the norm of gradients that are finite"

    @torch.no_grad()
    def step(self, optimizers: Sequence[Optimizer]) -> None:
        """Update the weights by gradients that `clip` found finite."""
        for optimizer in optimizers:
            optimizer.step()
        if self.masters:
            # The model gets them rounded.
            foreach("copy", list(self.masters), list(self.masters.values()))
        self.scale.note_good()

    # -- keeping ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The model's arrays with the weights that training goes on from, in fp32: rounded, they are the model's."""
        arrays = self._model.arrays()
        for name, parameter in self._model.named_parameters():
            if (master := self.masters.get(parameter)) is not None:
                arrays[name] = np.array(master.detach().cpu().numpy())
        return arrays

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set the weights from `arrays` (ValueError names what does not fit)."""
        self._model.load_arrays(arrays)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if (master := self.masters.get(parameter)) is not None:
                    master.copy_(torch.from_numpy(np.array(arrays[name])))


# -- modules that stay in fp32 ----------------------------------------------------------------------------


def _module(model: LanguageModel, name: str) -> nn.Module:
    """The module of a name.

    Raises:
        ConfigError: there is none, or it is a whole model.
    """
    every: dict[str, nn.Module] = dict(model.named_modules())
    modules = {key: module for key, module in every.items() if not isinstance(module, LanguageModel)}
    if name not in modules:
        top = [key for key in modules if isinstance(every[key.rpartition(".")[0]], LanguageModel)]
        raise ConfigError(
            f"training.fp32_modules: the {model.options.type} model has no module {name!r}."
            f"{did_you_mean(name, modules)} Modules: {', '.join(top)}, and those inside them; for the whole model use "
            "--precision fp32."
        )
    return modules[name]


def _compute_in_fp32(module: nn.Module, device: torch.device, around: torch.dtype | None) -> None:
    """Let a module see fp32 and no autocast; what leaves it is rounded to the format `around` it, if there is one."""
    if type(module).forward is nn.Module.forward:
        # A mere list of modules.
        for part in module.children():
            _compute_in_fp32(part, device, around)
        return
    inner: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            named = {name: cast_floats(value, torch.float32) for name, value in kwargs.items()}
            found = inner(*cast_floats(args, torch.float32), **named)
        return found if around is None else cast_floats(found, around)

    module.forward = forward


def _look_up(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    apply: Any = _Rows.apply
    rows: Tensor = apply(ids, embedding.weight)
    return rows


class _Rows(torch.autograd.Function):
    """Rows of a low-precision embedding, with gradients summed in fp32.

    torch's kernel for the CPU adds them up one by one in the embedding's own format, where 256 + 1 is 256 (bf16).
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(grads[0].float(), ids, ctx.rows, -1, False)
        return None, summed.to(grads[0].dtype)
