"""The adapters of a job: what `training.lora` needs, checked before the text is read."""

from __future__ import annotations

from lm.config import RunConfig
from lm.errors import ConfigError
from lm.runs.run import Run
from lm.training.module_needs import trainable_on_meta


def check_adapters(config: RunConfig, init: Run | None) -> None:
    """Refuse `training.lora` where no adapters can be trained.

    Args:
        config: all options, without an ensemble.
        init: the run that training starts from: the base.

    Raises:
        ConfigError: a plain sentence.
    """
    training = config.training
    if training.lora is None:
        for name in ("lora_alpha", "lora_dropout", "lora_modules"):
            if getattr(training, name):
                raise ConfigError(f"training.{name} is for adapters: add --lora RANK, or leave it out.")
        return
    flag = f"--lora {training.lora}"
    if init is None:
        raise ConfigError(
            f"{flag} trains adapters over the weights of a run: name that run with --init RUN, or leave --lora out to "
            "train a new model."
        )
    if (base := init.record.get("base")) is not None:
        raise ConfigError(
            f"{flag}: {init.name!r} is an adapter itself. Start from its base: --init {base['run']}; or leave --lora "
            "out to train all weights from both together."
        )
    for option, value in (("--ensemble", training.ensemble), ("--student", training.student)):
        if value:
            raise ConfigError(f"{flag} trains the adapters of one model: leave {option} out.")
    if training.shard:
        raise ConfigError(f"{flag} and --shard cannot be combined: leave --shard out.")
    # Which modules get an adapter, on a model without memory.
    trainable_on_meta(config, init.record["vocab_size"])
