"""The errors that are a user's to mend."""


class UserError(ValueError):
    """What is wrong with the input, and the remedy.

    The message names the field or flag, its value and what to do, in one paragraph: commands print
    it without a trace and exit with 2.  Any other exception is a bug, or a failure of the machine,
    and keeps its trace.
    """


class MachineError(RuntimeError):
    """What a machine has done wrong; printed without a trace too.

    The exit code is 1: ``trinity-megatron supervise`` starts the run again.
    """


class MissingInputError(UserError, FileNotFoundError):
    """A file or folder that the user has named is not there."""
