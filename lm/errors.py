"""Every error a user can meet, as one tree.

    LMError
    ├── ConfigError            an option is unknown, out of bounds or contradicts another
    ├── CorpusError            text is missing, empty, too short, badly encoded or lacks a split or column
    │   └── DownloadError      a named corpus could not be fetched whole
    ├── TokenizerError         a tokenizer cannot be trained, read or used
    │   └── UnknownSymbolError a symbol is outside the vocabulary and the policy is `error`
    ├── RunError               a run folder cannot be used as asked
    │   ├── RunNotFoundError   no such run, or no such kept state
    │   ├── RunExistsError     the name is taken
    │   ├── RunLockedError     another trainer holds the run
    │   ├── CorruptRunError    a file is truncated, edited or fails its hash
    │   ├── FormatVersionError the run was written by a newer Inkling
    │   └── VocabMismatchError tokenizer and weights do not belong together
    ├── TrainingError          training cannot start or go on
    │   ├── NonFiniteLossError the loss became NaN or infinite
    │   └── DivergedError      the loss is far above that of an untrained model
    ├── DeviceError            a device or precision is not there
    ├── ServerError            a server cannot be reached, or refuses
    └── MissingExtraError      an optional part of Inkling is not installed

Each message is one or two plain sentences: what happened with its values, the likely cause, what to do.
Callers switch on the type, never on the text.
"""


class LMError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them without a traceback."""


class ConfigError(LMError):
    """An option is unknown, out of bounds or contradicts another."""


class CorpusError(LMError):
    """Text is missing, empty, too short, badly encoded, or lacks a split or column."""

    def __init__(self, sentence: str = "", *, kind: str = "unreadable") -> None:
        """`kind` is the same in a word or two, for a list of files that are left out."""
        super().__init__(sentence)
        self.kind = kind


class DownloadError(CorpusError):
    """A named corpus could not be fetched whole, or is not the file it should be."""


class TokenizerError(LMError):
    """A tokenizer cannot be trained, read or used."""


class UnknownSymbolError(TokenizerError):
    """A symbol is outside the vocabulary and the policy is `error`."""


class RunError(LMError):
    """A run folder cannot be used as asked."""


class RunNotFoundError(RunError):
    """No run, or no kept state, of that name."""


class RunExistsError(RunError):
    """The name of a new run is taken."""


class RunLockedError(RunError):
    """Another trainer is at work in this run folder."""


class CorruptRunError(RunError):
    """A file of a run is truncated, edited or fails its hash."""


class FormatVersionError(RunError):
    """The run was written by a newer Inkling."""


class VocabMismatchError(RunError):
    """Tokenizer and weights do not belong together."""


class TrainingError(LMError):
    """Training cannot start or go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class DivergedError(TrainingError):
    """The training loss is far above that of a model that has learned nothing."""


class DeviceError(LMError):
    """A device or precision that was asked for is not there."""


class ServerError(LMError):
    """A server cannot be reached, or refuses what it was asked."""


class MissingExtraError(LMError):
    """An optional part of Inkling is not installed."""
