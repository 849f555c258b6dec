"""Errors of input and of stored data, which the command line prints without a traceback."""


class InputError(ValueError):
    """The input is invalid: one line that names the problem, its place and the remedy.

    The command line exits with status 2.
    """


class DamageError(Exception):
    """Stored bytes differ from the bytes that were published.

    The command line exits with status 1.
    """
