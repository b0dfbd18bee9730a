"""The one tree of errors. Messages say what was found, what was expected, where, and what to do."""


class PtError(Exception):
    """Base of everything this package raises on purpose; the CLI prints it as one line and exits with 2."""


class ConfigError(PtError):
    """A model configuration, a mapping or an option is invalid."""


class CheckpointError(PtError):
    """A checkpoint is missing, incomplete, malformed or does not match its configuration."""


class EngineError(PtError):
    """An engine cannot be built, opened or run here."""


class CommunicationError(PtError):
    """A collective failed: a rank died, hung, aborted, or the ranks disagree."""


class ServingError(PtError):
    """A server could not be started, reached, or answered with an error."""
