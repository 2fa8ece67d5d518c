"""The errors a user can meet, one class for each thing they can do about it.

The command lines print the message as one line and leave with `exit_code`; the server turns it into
OpenAI's error body. A message says what was wrong, the value received, the limit and the next step.
"""


class MPTError(Exception):
    """Base of everything a user can cause or mend."""

    exit_code = 2


class UserError(MPTError):
    """A wrong name, value or file: the user can fix it and try again."""


class UnsupportedConfig(UserError):
    """A checkpoint's config asks for something this implementation does not compute."""


class ImpossibleConfig(UnsupportedConfig):
    """A config names a size that no model has: its file is damaged, or made to take all memory."""

    exit_code = 3


class UnsupportedTokenizer(UnsupportedConfig):
    """A tokenizer of a kind that is not read here; the weights beside it may be."""


class CheckpointNotFound(UserError):
    """No checkpoint under this name or path."""


class DamagedFile(MPTError):
    """A file is truncated, unreadable or does not match its manifest."""

    exit_code = 3


class TrainingDiverged(MPTError):
    """The loss is not a number any more, or has left the range the run allows."""

    exit_code = 4


class MachineRefused(MPTError):
    """Disk full, out of memory, port taken: the machine said no."""

    exit_code = 5


class EngineStopped(MPTError):
    """A model that answered cannot any more, and no later request can: the process must be started again."""

    exit_code = 6


class DeviceLost(EngineStopped):
    """What computes is gone: a CUDA context after an error that none of its later calls survives, another process."""


class Interrupted(MPTError):
    """Stopped early after saving; the same command goes on from there."""

    exit_code = 75

    def __init__(self, message: str, is_planned: bool = False) -> None:
        """is_planned: whoever started it asked for a part of it."""
        super().__init__(message)
        self.is_planned = is_planned
