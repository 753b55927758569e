"""The options of an ensemble and of its members.

A caller describes one model and asks for `training.ensemble` of them. The run records `model.type=ensemble`, with the
model as `model.member`. `unwrapped` and `as_ensemble` turn one form into the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm.config import RunConfig, Section, TrainingConfig
from lm.errors import ConfigError
from lm.models.training_method import training_method
from lm.training.plan import DEFAULT_MINUTES

if TYPE_CHECKING:
    from lm.runs.run import Run


TEACHER_SHARE = 0.5
"""Share of the minutes for the teacher of `training.student`."""


def as_ensemble(config: RunConfig) -> RunConfig:
    """The options of the run that joins `training.ensemble` models of these options."""
    size = config.training.ensemble
    model = Section(type="ensemble", size=size, member=config.model.model_dump(mode="json"))
    return _with(config, {"ensemble": None}, model)


def unwrapped(config: RunConfig) -> RunConfig:
    """The options of one member, with `training.ensemble`, for the options of an ensemble; others unchanged."""
    fields = config.model.model_dump(mode="json")
    if not isinstance(fields.get("member"), dict) or config.training.ensemble is not None:
        return config
    return _with(config, {"ensemble": fields["size"]}, Section.model_validate(fields["member"]))


def member_config(config: RunConfig, number: int) -> RunConfig:
    """The options of member `number` (from 0) of an ensemble: another seed, and its share of the minutes.

    The first member alone keeps a film.
    """
    one = with_shared_minutes(unwrapped(config))
    film = one.training.film and number == 0
    return _with(one, {"ensemble": None, "seed": one.training.seed + number, "film": film}, one.model)


def one_model(config: RunConfig) -> RunConfig:
    """The options of one training: those of the first member of an ensemble; others unchanged."""
    return member_config(config, 0) if training_method(config).of_members else config


def with_shared_minutes(config: RunConfig) -> RunConfig:
    """The options with the minutes of one member; unchanged if there is no ensemble or no plan by time."""
    size, minutes = config.training.ensemble, minutes_of(config.training)
    if size is None or minutes is None:
        return config
    return _with(config, {"minutes": minutes * _teacher_share(config) / size}, config.model)


def teacher_config(config: RunConfig) -> RunConfig:
    """The options of the ensemble that `training.student` has as its teacher."""
    minutes = minutes_of(config.training)
    share = {"minutes": None if minutes is None else minutes * _teacher_share(config), "student": False}
    return as_ensemble(_with(config, share, config.model))


def student_config(config: RunConfig) -> RunConfig:
    """The options with the minutes of the student alone; unchanged without `training.student`."""
    minutes = minutes_of(config.training)
    if not config.training.student or minutes is None:
        return config
    return _with(config, {"minutes": minutes * (1 - _teacher_share(config))}, config.model)


def _teacher_share(config: RunConfig) -> float:
    """The share of the minutes in which the ensemble is trained."""
    return TEACHER_SHARE if config.training.student else 1.0


def minutes_of(training: TrainingConfig) -> float | None:
    """The minutes of a plan by time, or the default if no length is given."""
    if training.max_steps is None and training.epochs is None:
        return training.minutes or DEFAULT_MINUTES
    return training.minutes


def check_ensemble(config: RunConfig, init: Run | None) -> None:
    """Refuse options that no ensemble can have.

    Args:
        config: from `unwrapped`.
        init: the run that training starts from.

    Raises:
        ConfigError: a plain sentence.
    """
    if init is not None and training_method(init.config).of_members:
        raise ConfigError(
            f"--init {init.name} is an ensemble, and training starts from one model: give another run. To train one "
            f"model on its predictions: --distill {init.name}"
        )
    size, kind = config.training.ensemble, config.model.type
    if config.training.student and config.training.distill is not None:
        raise ConfigError("--student has the ensemble as its teacher: leave --distill out.")
    if size is None:
        if config.training.student:
            raise ConfigError("--student needs a teacher: add --ensemble K, or give a run with --distill RUN instead.")
        return
    method = training_method(config)
    if method.of_members:
        raise ConfigError(f"--ensemble {size}: the model is an ensemble already (model.size): leave --ensemble out.")
    if method.in_one_pass:
        raise ConfigError(f"--ensemble {size}: {kind} models are counts, the same for every seed: choose a network.")
    if (config.training.devices or 1) > 1:
        raise ConfigError(f"--ensemble {size} trains its models one after another in one process: leave --devices out.")


def _with(config: RunConfig, training: dict[str, Any], model: Section) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training), "model": model})
