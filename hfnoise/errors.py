"""The exceptions of hfnoise that are not plain ValueErrors."""


class UsageError(Exception):
    """A command line that cannot be run: the message goes to the terminal, without a traceback, with exit code 2."""


class PushError(OSError):
    """A push to the Hub that did not go through: what failed, what is kept and where, and how to push again.

    An OSError, as the errors of huggingface_hub are; the original one is its `__cause__`. A command line prints the
    message without a traceback and ends with exit code 1.
    """


class CheckpointError(UsageError, ValueError):
    """A checkpoint that a run cannot go on from: which, what is wrong with it, and what to do.

    A ValueError for who trains in Python. A command line prints the message without a traceback and ends with exit
    code 2: training has not begun.
    """
