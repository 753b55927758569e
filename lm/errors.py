"""All errors that a user can see, as one tree.

    LMError
    ├── ConfigError            an option is unknown, out of bounds or contradicts another
    │   ├── UnsupportedPartError a model lacks the part to inspect
    │   └── UnsupportedExportError a format cannot hold a model or tokenizer
    ├── CorpusError            text is missing, empty, too short, badly encoded or lacks a split or column
    │   └── DownloadError      a named corpus could not be fetched whole
    ├── TokenizerError         a tokenizer cannot be trained, read or used
    │   └── UnknownSymbolError a symbol is outside the vocabulary and the policy is `error`
    ├── RunError               a run folder cannot be used as requested
    │   ├── RunNotFoundError   no such run or checkpoint
    │   ├── RunExistsError     the name is taken
    │   ├── RunLockedError     another process trains the run
    │   ├── CorruptRunError    a file is truncated, edited or fails its hash
    │   ├── FormatVersionError the run was written by a newer Inkling
    │   └── VocabMismatchError tokenizer and weights do not belong together
    ├── ModelSourceError       a model from elsewhere is missing, damaged or of a kind that cannot be imported
    ├── TrainingError          training cannot start or continue
    │   ├── NonFiniteLossError the loss became NaN or infinite
    │   └── DivergedError      the loss is far above that of an untrained model
    ├── DeviceError            a device or precision is not available
    ├── ServerError            a server cannot be reached, or refuses a request
    └── MissingExtraError      an optional package is not installed

Each message is one or two sentences: what happened with its values, the likely cause, what to do.
Callers check the type, never the text.
"""


class LMError(Exception):
    """Base of all errors that the user can correct; the command line prints them without a traceback."""

    is_reported = False
    """Whether another process of the same job and machine prints it."""


class ConfigError(LMError):
    """An option is unknown, out of bounds or contradicts another."""


class UnsupportedPartError(ConfigError):
    """A model lacks the part to inspect."""


class UnsupportedExportError(ConfigError):
    """A format cannot hold a model or a tokenizer."""


class CorpusError(LMError):
    """Text is missing, empty, too short, badly encoded, or lacks a split or column."""

    def __init__(self, sentence: str = "", *, kind: str = "unreadable") -> None:
        """`kind` is the error in one or two words, for a list of skipped files."""
        super().__init__(sentence)
        self.kind = kind


class DownloadError(CorpusError):
    """A named corpus could not be fetched whole, or is not the file it should be."""


class TokenizerError(LMError):
    """A tokenizer cannot be trained, read or used."""


class UnknownSymbolError(TokenizerError):
    """A symbol is outside the vocabulary and the policy is `error`."""


class RunError(LMError):
    """A run folder cannot be used as requested."""


class RunNotFoundError(RunError):
    """No run or checkpoint of that name."""


class RunExistsError(RunError):
    """The name of a new run is taken."""


class RunLockedError(RunError):
    """Another process trains in this run folder."""


class CorruptRunError(RunError):
    """A file of a run is truncated, edited or fails its hash."""


class FormatVersionError(RunError):
    """The run was written by a newer Inkling."""


class VocabMismatchError(RunError):
    """Tokenizer and weights do not belong together."""


class ModelSourceError(LMError):
    """A model from elsewhere is missing, damaged or of a kind that cannot be imported."""


class TrainingError(LMError):
    """Training cannot start or continue."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class DivergedError(TrainingError):
    """The training loss is far above that of an untrained model."""


class DeviceError(LMError):
    """A requested device or precision is not available."""


class ServerError(LMError):
    """A server cannot be reached, or refuses a request."""


class MissingExtraError(LMError):
    """An optional package is not installed."""
