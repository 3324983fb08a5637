"""The exceptions of hfnoise that are not plain ValueErrors."""


class UsageError(Exception):
    """A command line that cannot be run: the message goes to the terminal, without a traceback, with exit code 2."""
