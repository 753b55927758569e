"""An ensemble: the mean of the probabilities of several models of one kind, each trained with its own seed.

    p = (p(member 1) + … + p(member K)) / K

The members share tokenizer and options. Each of them is trained by itself (`lm.jobs.ensemble`), so the errors that come
from its initial weights and its dropout are its own, and the mean cancels a part of them. Probabilities are averaged,
not logits: the loss of the mean is never above the mean of the members' losses.

The state has the tensors of all members, as MEMBER/NAME. Arrays that are no weights and are equal in all members, as
the counts of hybrids, are stored once.

Source: Hansen and Salamon 1990, "Neural network ensembles"; of language models: Józefowicz et al. 2016.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lm.config import Section
from lm.kernels.ensemble_decoding import MEMBERS, SHARED, member_arrays
from lm.models.base import Inspection, LanguageModel, MixturePart, ModelOptions, State, build_model
from lm.models.contributions import mixture_log_probabilities, mixture_terms
from lm.models.layout import Stage, Symbol

REGISTERS = {"ensemble": "Ensemble"}


class EnsembleOptions(ModelOptions):
    """Options of an ensemble: those of its members, and their number."""

    type: Literal["ensemble"] = Field("ensemble", description="Models whose probabilities are averaged.")
    size: int = Field(2, ge=2, le=64, description="Number of members. `--ensemble K` sets it.")
    member: Section = Field(
        Section(type="gru"), description="Options of each member, as a section `model` with a type."
    )

    @field_validator("member")
    @classmethod
    def _is_complete(cls, value: Section) -> Section:
        if value.type == "ensemble":
            raise ValueError("an ensemble has no ensembles as members")
        return Section.model_validate(value.resolve("model").model_dump(mode="json"))


class Ensemble(LanguageModel):
    """The mean of the members' probabilities; its logits are log-probabilities."""

    Options = EnsembleOptions
    trained_by = "members"

    options: EnsembleOptions

    def __init__(self, options: EnsembleOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        members = [build_model(options.member, vocab_size) for _ in range(options.size)]
        self.members = nn.ModuleList(members)
        self.batching = members[0].batching
        of_what = f" ({members[0].kind})" if members[0].kind else ""
        self.kind = f"ensemble of {options.size} {options.member.type} models{of_what}"

    @property
    def context_length(self) -> int | None:
        """See `LanguageModel.context_length`."""
        return self._each()[0].context_length

    def _each(self) -> list[LanguageModel]:
        return list(self.members)  # type: ignore[arg-type]

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`; the logits are log-probabilities, in fp32."""
        return self._mean(state, lambda member, own: member(ids, own))

    def held_out_logits(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.held_out_logits`."""
        return self._mean(state, lambda member, own: member.held_out_logits(ids, targets, own))

    def _mean(
        self, state: State | None, logits_of: Callable[[LanguageModel, State | None], tuple[Tensor, State]]
    ) -> tuple[Tensor, State]:
        """The logarithm of the mean of the members' probabilities, and the state.

        Args:
            state: of the ensemble.
            logits_of: gives the logits of a member with its state, and its next state.
        """
        total: Tensor | None = None
        after: dict[int, State] = {}
        for number, member in enumerate(self._each()):
            logits, after[number] = logits_of(member, None if state is None else _part(state, number))
            logs = logits.float().log_softmax(dim=-1)
            total = logs if total is None else torch.logaddexp(total, logs)
        assert total is not None
        return total - math.log(self.options.size), _joined(after)

    @contextlib.contextmanager
    def traceable(self) -> Iterator[None]:
        """See `LanguageModel.traceable`."""
        with contextlib.ExitStack() as stack:
            for member in self._each():
                stack.enter_context(member.traceable())
            yield

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        return "contributions", "terms", "mixture"

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        """The members as parts of a mixture; terms of one name are added over the members."""
        terms, mixture, after = {}, {}, {}
        weight = torch.full(ids.shape, 1 / self.options.size, device=ids.device)
        for number, member in enumerate(self._each()):
            own = None if state is None else _part(state, number)
            seen = member.inspect(ids, own, parts=("terms",) if parts else ())
            name = f"member {number + 1}"
            mixture[name] = MixturePart(weight, seen.logits.float().log_softmax(dim=-1))
            terms[name], after[number] = seen.terms, seen.state
        summed = mixture_terms(mixture, terms) if parts & {"contributions", "terms"} else {}
        return Inspection(
            mixture_log_probabilities(list(mixture.values())),
            _joined(after),
            contributions=summed if "contributions" in parts else {},
            terms=summed if "terms" in parts else {},
            mixture=mixture if "mixture" in parts else {},
        )

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        return self._each()[0].symbols()

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`: the stages of each member, then the mean."""
        stages = [
            replace(
                stage,
                name=f"member {number + 1}: {stage.name}",
                parameters={f"members.{number}.{name}": shape for name, shape in stage.parameters.items()},
                state={f"{number}/{name}": shape for name, shape in stage.state.items()},
            )
            for number, member in enumerate(self._each())
            for stage in member.layout()
        ]
        mean = Stage("mean", "log((p(member 1) + … + p(member K)) / K)", outputs={"log p": ("B", "T", "V")})
        return (*stages, mean)

    def load_members(self, members: Sequence[dict[str, npt.NDArray[Any]]]) -> None:
        """Set the weights of each member, from its own `arrays`.

        Raises:
            ValueError: as `load_arrays`.
        """
        for member, arrays in zip(self._each(), members, strict=True):
            member.load_arrays(arrays)

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`; the members share their counts."""
        first, *others = self._each()
        first.fit(ids)
        for member in others:
            member.use_fitted(first.fitted())

    def num_counts(self) -> int:
        """See `LanguageModel.num_counts`; all members have the same counts."""
        return self._each()[0].num_counts()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `LanguageModel.arrays`."""
        return join_arrays([member.arrays() for member in self._each()], set(self._each()[0].state_dict()))

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """See `LanguageModel.load_arrays`."""
        self.load_members([member_arrays(arrays, number) for number in range(self.options.size)])


def join_arrays(members: list[dict[str, npt.NDArray[Any]]], weights: set[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an ensemble from those of its members.

    Args:
        members: the arrays of each.
        weights: names of trained arrays, which each member has for itself.
    """
    first, *others = members
    shared = {
        name
        for name, array in first.items()
        if name not in weights and all(np.array_equal(array, other[name]) for other in others)
    }
    joined = {SHARED + name: first[name] for name in shared}
    for number, arrays in enumerate(members):
        joined |= {MEMBERS.format(number) + name: array for name, array in arrays.items() if name not in shared}
    return joined


def _part(state: State, number: int) -> State:
    """The state of one member."""
    start = f"{number}/"
    tensors = {name.removeprefix(start): part for name, part in state.tensors.items() if name.startswith(start)}
    growing = frozenset(name for name in tensors if start + name in state.growing)
    return State(tensors, growing, state.ragged, state.reserved)


def _joined(states: dict[int, State]) -> State:
    """The state of the ensemble, from those of its members."""
    tensors = {f"{number}/{name}": part for number, each in states.items() for name, part in each.tensors.items()}
    growing = frozenset(f"{number}/{name}" for number, each in states.items() for name in each.growing)
    ragged, reserved = (any(getattr(each, name) for each in states.values()) for name in ("ragged", "reserved"))
    return State(tensors, growing, ragged, reserved)
