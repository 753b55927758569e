"""Mixed precision: how much of a training computes in a low number format.

    level   weights   products   norms, softmax, loss   the optimizer's weights and moments
    O0      fp32      fp32 *     fp32                   fp32                               * or tf32
    O1      fp32      low        fp32 (autocast)        fp32
    O2      low       low        fp32                   fp32: master weights
    O3      low       low        low                    low

"low" is bf16 or fp16. The calls of a step:

    computing ─► backward (loss × scale) ─► collect (into fp32) ─► clip (÷ scale, norm) ─► step  or  overflow
                                                                └► update (the same on the device, without a wait)

On a GPU nothing is read between backward and update: the norm, the factor of the gradients and the flag that forbids
the update stay on the device. At O3 in fp16 gradients are divided by the scale inside the optimizer, in fp32.

At O2 the optimizer updates fp32 copies of the weights, and the model gets them rounded: a small update of a low weight
would be lost in rounding. Modules in `training.fp32_modules`, and those that declare it, keep fp32 weights.

Sources: Micikevicius et al. 2018 (mixed precision, master weights, loss scaling); the levels are named as in NVIDIA's
Apex.
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
from lm.kernels.dispatch import bf16_instruction_set, cast_floats, keep_in_fp32, usable_for_all
from lm.models.base import LanguageModel, whole
from lm.registry import did_you_mean
from lm.torch_private import foreach, sparse_rows
from lm.training.guarded_step import gradient_norms, guarded_step
from lm.training.module_needs import module_needs

Level = Literal["O0", "O1", "O2", "O3"]
LOW: tuple[Precision, ...] = ("bf16", "fp16")
NORMS = (nn.RMSNorm, nn.LayerNorm)
MIN_SCALE = 2.0**-4
"""A dynamic loss scale does not fall below this; below 1 the scale is not the cause of an overflow."""
FINITE_GRADIENTS = "the norm of gradients that are finite"
MAX_OVERFLOWS = 20
"""Steps in a row that a fixed loss scale may lose before it is not the cause of an overflow."""


# -- choosing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A number format, and the level of its use."""

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
    """All formats of a device, the most exact first."""
    full: tuple[Precision, ...] = ("fp32", "tf32")
    levels: tuple[Level, ...] = ("O1", "O2", "O3")
    found = [Format(precision, "O0") for precision in full if _missing(precision, device) is None]
    found += [Format(precision, level) for precision in LOW if _missing(precision, device) is None for level in levels]
    return found


def choose_format(config: TrainingConfig, device: torch.device, *, bf16_on_cpu: bool = True) -> Format:
    """The format of the options, or the best one of the device.

    Args:
        config: the training options.
        device: of the model.
        bf16_on_cpu: see `ModelOptions.bf16_on_cpu`.

    Raises:
        DeviceError: the device does not have the format.
        ConfigError: loss scale or fp32_modules do not go with the format.
    """
    precision, level = config.precision, config.amp
    if precision == "auto":
        fast: Precision = "bf16" if _missing("bf16", device) is None else "fp16"
        if level is not None:
            low = level != "O0"
        elif device.type == "cpu":
            # A step that torch compiles does not use the kernels.
            low = bf16_on_cpu and config.compile != "on" and bf16_instruction_set() is not None
        else:
            low = device.type == "cuda" and fast == "bf16"
        precision = fast if low else "fp32"
    if missing := _missing(precision, device):
        every: tuple[Precision, ...] = ("fp32", "tf32", *LOW)
        others = [name for name in every if name != precision and _missing(name, device) is None]
        raise DeviceError(f"--precision {precision}: {missing}; use {', '.join(others[:-1])} or {others[-1]}.")
    level = level or ("O1" if precision in LOW else "O0")
    if level == "O0" and config.loss_scale not in ("auto", None):
        scale = f"{config.loss_scale:g}" if isinstance(config.loss_scale, float) else config.loss_scale
        raise ConfigError(
            f"--loss-scale {scale} is for low precision, and this training is in {precision}: leave it out, or choose "
            "--precision fp16 or bf16."
        )
    if precision == "tf32" and config.fp32_modules:
        raise ConfigError("training.fp32_modules: tf32 applies to all products; use it with bf16 or fp16.")
    return Format(precision, level)


def _missing(precision: Precision, device: torch.device) -> str | None:
    """Why a device does not have a format; None if it has."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"the device {device.type}"
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        return f"only NVIDIA GPUs from Ampere on compute in tf32, and this is {name}"
    # Emulated formats are slower than fp32.
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{name} does not compute in bf16"
    return None


# -- the loss scale -----------------------------------------------------------------------------------


class LossScale:
    """The factor of the loss before backward. Torch's GradScaler does not accept fp16 weights.

    On a GPU the factor of the next step depends on numbers that the host has not read yet. `on_device` is that factor,
    `advance` changes it as `note_good` and `note_overflow` do, and `follow` does the same when the host has read them.
    """

    def __init__(self, config: TrainingConfig, precision: Precision) -> None:
        wanted = config.loss_scale
        if wanted == "auto":
            wanted = "dynamic" if precision == "fp16" else None
        self.dynamic = wanted == "dynamic"
        self.enabled = wanted is not None
        self.value = config.loss_scale_init if self.dynamic else float(wanted or 1.0)
        self._config = config
        self._good = 0
        self._overflows = 0
        self._on_device: tuple[Tensor, Tensor] | None = None

    def on_device(self, device: torch.device) -> Tensor:
        """The factor, a scalar in fp32 on the device."""
        return self._tensors(device)[0]

    def advance(self, norm: Tensor, loss: Tensor) -> Tensor:
        """The factor after a step with this gradient norm and loss (scalars on the device), without a wait.

        As on the host, a loss that is not finite changes nothing: the factor is not its cause.
        """
        value, good = self._tensors(norm.device)
        if self.dynamic:
            config, counted = self._config, good + 1
            grows = counted == config.loss_scale_window
            grown = torch.where(grows, value * config.loss_scale_growth, value)
            lower = (value * config.loss_scale_backoff).clamp(min=MIN_SCALE)
            is_good, changes = torch.isfinite(norm), torch.isfinite(loss)
            next_value = torch.where(changes, torch.where(is_good, grown, lower), value)
            next_good = torch.where(changes, torch.where(is_good & ~grows, counted, 0), good)
            self._on_device = next_value, next_good
        return self.on_device(norm.device)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The factor and the good steps in a row, on the device."""
        if self._on_device is None:
            value = torch.full((), self.value, dtype=torch.float32, device=device)
            self._on_device = value, torch.full((), self._good, dtype=torch.int64, device=device)
        return self._on_device

    def note_good(self) -> None:
        """Count a step with finite gradients; after `loss_scale_window` in a row a dynamic scale grows."""
        self._good, self._overflows, self._on_device = self._good + 1, 0, None
        if self.dynamic and self._good == self._config.loss_scale_window:
            self.value, self._good = self.value * self._config.loss_scale_growth, 0

    def note_overflow(self) -> bool:
        """Count a step with non-finite gradients: a dynamic scale falls. False: the scale is not the cause."""
        self._good, self._overflows, self._on_device = 0, self._overflows + 1, None
        is_cause = self.value >= 1 if self.dynamic else self.enabled and self._overflows <= MAX_OVERFLOWS
        if self.dynamic:
            self.value = max(self.value * self._config.loss_scale_backoff, MIN_SCALE)
        return is_cause

    def follow(self, value: float, *, is_good: bool) -> bool:
        """`note_good` or `note_overflow` of a step whose factor afterwards was `value` on the device.

        Returns:
            False: the scale is not the cause of the overflow.
        """
        ahead, is_cause = self._on_device, True
        if is_good:
            self.note_good()
        else:
            is_cause = self.note_overflow()
        self.value, self._on_device = value, ahead
        return is_cause

    def state(self) -> dict[str, float]:
        """Everything that resuming needs; {} without a scale."""
        return {"scale": self.value, "good_steps": self._good, "overflows": self._overflows} if self.enabled else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, or from that of torch's GradScaler, which earlier versions saved."""
        if self.enabled:
            self.value = float(state["scale"])
            self._good = int(state["good_steps"] if "good_steps" in state else state["_growth_tracker"])
            self._overflows = int(state.get("overflows", 0))
            self._on_device = None


# -- applying a level -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """The numbers of an update, on the device: the host has not waited for them."""

    norm: Tensor
    """Of the gradients before clipping, a scalar in fp32; NaN or infinite if a gradient is."""
    finite: Tensor
    """Whether the weights were changed: a bool scalar."""
    norms: Tensor
    """(P,) fp32: of each gradient, times the loss scale."""
    names: list[str]
    """P names of weights."""

    def nonfinite_gradient(self, norms: Sequence[float]) -> str:
        """The first gradient in backward order that is not finite, by the numbers of `norms`."""
        bad = [name for name, norm in zip(self.names, norms, strict=True) if not math.isfinite(norm)]
        return f"the gradient of {bad[-1]}" if bad else FINITE_GRADIENTS


class MixedPrecision:
    """Casts a model to a level, and runs its passes in it; make the optimizers afterwards, with `masters`.

    A loop of your own:

        mixed = MixedPrecision(model, config.training, device)  # casts the model, which is on its device
        optimizers = make_optimizers(model, config.training, fused=True, masters=mixed.masters)
        for inputs, targets in batches:
            with mixed.computing():
                loss = model.training_loss(inputs, targets)
            mixed.backward(loss.objective)  # × the loss scale
            mixed.collect()  # gradients of low weights to their masters
            norm = mixed.clip(1.0)  # ÷ the loss scale
            if math.isfinite(norm):
                mixed.step(optimizers)
            else:
                mixed.scale.note_overflow()
            for optimizer in optimizers:
                optimizer.zero_grad()
        arrays = mixed.arrays()  # fp32, for model.safetensors

    Args:
        model: in fp32, on its device.
        config: precision, amp, fp32_modules and the options of the loss scale.
        device: the model's.

    Raises:
        DeviceError, ConfigError: see `choose_format`; or fp32_modules names a module that the model does not have.
    """

    def __init__(self, model: LanguageModel, config: TrainingConfig, device: torch.device) -> None:
        self.device = device
        self.format = choose_format(config, device, bf16_on_cpu=model.options.bf16_on_cpu)
        self.scale = LossScale(config, self.format.precision)
        self.masters: dict[Tensor, Tensor] = {}
        """The fp32 weights that the optimizer updates in place of low parameters."""
        self._model = model
        # Divided by the loss scale in fp16, a gradient below 6e-8 is 0, and one below 6e-5 has fewer digits.
        divides_in_fp32 = self.scale.enabled and self.format.level == "O3" and self.format.low == torch.float16
        self.updates_on_device = device.type == "cuda" or divides_in_fp32
        """Whether a step calls `update`, in place of `clip` and `step`."""
        named = [_module(model, name) for name in config.fp32_modules]
        if self.format.level != "O0":
            self._apply(named)

    @functools.cached_property
    def _unclipped(self) -> set[Tensor]:
        """The weights whose optimizer bounds their steps itself."""
        return {p for p, needs in module_needs(self._model).items() if needs.optimizer_kind == "row_adagrad"}

    @functools.cached_property
    def trained(self) -> list[Tensor]:
        """The tensors that the optimizers update, in the order of the model's parameters."""
        return [self.masters.get(parameter, parameter) for _, parameter in self._named()]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen."""
        return [(name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad]

    def _apply(self, named: list[nn.Module]) -> None:
        level, low = self.format.level, self.format.low
        assert low is not None
        norms = [module for module in self._model.modules() if isinstance(module, NORMS)] if level == "O2" else []
        inner = {part for module in named for part in module.modules() if part is not module}
        outermost = [*named, *norms]
        for module in dict.fromkeys(outermost):
            # Inside a module in fp32 nothing needs to be cast.
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
            if self.format.level == "O2" and parameter.requires_grad:
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
        """The context of a forward pass."""
        return computing(self.device, self.format.precision, autocast=self.format.level == "O1")

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of the scaled objective to the existing ones."""
        scaled = objective
        if self.scale.enabled:
            on_device = self.updates_on_device
            scaled = objective * (self.scale.on_device(objective.device) if on_device else self.scale.value)
        # Backward casts nothing itself, but its products may use tf32.
        with computing(self.device, "tf32" if self.format.precision == "tf32" else "fp32", autocast=False):
            scaled.backward()

    @torch.no_grad()
    def collect(self) -> None:
        """Move the gradients of low weights to their masters; those of several batches add up there in fp32."""
        for parameter, master in self.masters.items():
            if parameter.grad is None:
                continue
            grad = (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> float:
        """Divide the gradients by the loss scale, then clip them; those of context tables are not clipped.

        Args:
            max_norm: None: no clipping.

        Returns:
            The norm before clipping; NaN or infinite if a gradient is, and then nothing is clipped.
        """
        with_grad = [tensor for tensor in self.trained if tensor.grad is not None]
        # Their optimizer bounds their steps itself.
        unclipped = [_values(tensor) for tensor in with_grad if tensor in self._unclipped]
        if self.scale.enabled and with_grad:
            # Clip true gradients: those of fp16 still contain the loss scale (65,536 at first).
            foreach("mul", [_values(tensor) for tensor in with_grad], 1 / self.scale.value)
        if not all(math.isfinite(float(values.sum(dtype=torch.float32))) for values in unclipped):
            return math.nan
        clipped = [tensor for tensor in with_grad if tensor not in self._unclipped]
        grads = [tensor.grad for tensor in clipped if tensor.grad is not None]
        max_norm = math.inf if max_norm is None else max_norm
        if usable_for_all("clip", grads):
            return clip_grad_norm(grads, max_norm)
        # The squares of a low gradient may overflow its format.
        total = torch.nn.utils.get_total_norm([grad.float() for grad in grads])
        norm = float(whole(total))
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(clipped, max_norm, total)
        return norm

    def nonfinite_gradient(self) -> str:
        """The first gradient in backward order that is not finite."""
        for name, own in reversed(self._named()):
            tensor = self.masters.get(own, own)
            if tensor.grad is not None and not bool(torch.isfinite(whole(_values(tensor))).all()):
                return f"the gradient of {name}"
        return FINITE_GRADIENTS

    @torch.no_grad()
    def step(self, optimizers: Sequence[Optimizer]) -> None:
        """Update the weights with gradients that `clip` found finite."""
        for optimizer in optimizers:
            optimizer.step()
        if self.masters:
            # The model gets them rounded.
            foreach("copy", list(self.masters), list(self.masters.values()))
        self.scale.note_good()

    @torch.no_grad()
    def update(self, optimizers: Sequence[Optimizer], loss: Tensor, max_norm: float | None) -> Update:
        """`clip` and `step` without a wait for the device; the host calls `note_…` of the scale when it has the norm.

        Nothing is changed if the loss or a gradient is not finite. Clipping and the loss scale are one factor, which
        the optimizer applies in fp32.

        Args:
            optimizers: of the model.
            loss: of the step, a scalar on the device.
            max_norm: None: no clipping.
        """
        named = [
            (name, tensor)
            for (name, _), tensor in zip(self._named(), self.trained, strict=True)
            if tensor.grad is not None
        ]
        norms = whole(gradient_norms([_values(tensor) for _, tensor in named]))
        clipped = [index for index, (_, tensor) in enumerate(named) if tensor not in self._unclipped]
        own = norms if len(clipped) == len(named) else torch.stack([norms[index] for index in clipped])
        norm = torch.linalg.vector_norm(own)
        if self.scale.enabled:
            norm = norm / self.scale.on_device(norm.device)
        if len(clipped) < len(named):
            # One that is not finite among the others forbids the update as well.
            norm = torch.where(torch.isfinite(norms).all(), norm, math.nan)
        unscale = 1 / self.scale.on_device(norm.device) if self.scale.enabled else torch.ones_like(norm)
        factor = unscale if max_norm is None else unscale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        for optimizer in optimizers:
            bounds_itself = optimizer.param_groups[0]["params"][0] in self._unclipped
            guarded_step(optimizer, unscale if bounds_itself else factor, finite)
        if self.masters:
            foreach("copy", list(self.masters), list(self.masters.values()))
        self.scale.advance(norm, loss)
        return Update(norm, finite, norms, [name for name, _ in named])

    # -- saving -------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The model's arrays, with master weights in place of the rounded ones."""
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


def _values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor's gradient."""
    assert tensor.grad is not None
    return sparse_rows(tensor.grad)[1] if tensor.grad.is_sparse else tensor.grad


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


def _compute_in_fp32(module: nn.Module, device: torch.device, output: torch.dtype | None) -> None:
    """Give a module fp32 inputs without autocast; its output is rounded to the format `output`, if there is one."""
    if type(module).forward is nn.Module.forward:
        # Only a list of modules.
        for part in module.children():
            _compute_in_fp32(part, device, output)
        return
    inner: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            named = {name: cast_floats(value, torch.float32) for name, value in kwargs.items()}
            found = inner(*cast_floats(args, torch.float32), **named)
        return found if output is None else cast_floats(found, output)

    module.forward = forward


def _look_up(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    apply: Any = _Rows.apply
    rows: Tensor = apply(ids, embedding.weight)
    return rows


class _Rows(torch.autograd.Function):
    """Rows of a low-precision embedding, with gradients summed in fp32.

    Torch's CPU kernel adds them one by one in the embedding's own format, where 256 + 1 is 256 (bf16).
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
