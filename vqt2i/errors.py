"""The exceptions a user can meet. Each message names the thing, what was found, what was expected and what to do.

`vqt2i.cli.main` prints a `UserError` on one or two lines and exits with code 2; anything else is our bug and keeps its
traceback.
"""


class UserError(Exception):
    """Something the user gave us cannot be used."""


class ConfigError(UserError):
    """A configuration key or value that does not fit."""


class DataError(UserError):
    """An image, caption, shard or data set that cannot be used."""


class CheckpointError(UserError):
    """A model folder or checkpoint that is missing, damaged or does not belong with the others."""


class ResourceError(UserError):
    """Memory or devices that a job needs and this machine does not have free."""


class PromptError(UserError):
    """A prompt or sampling setting that cannot be used."""
