"""What goes wrong because of what was asked for, not because of a defect in this code."""


class InputError(ValueError):
    """Bad input: one clear line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DamageError(Exception):
    """Stored bytes are not the bytes that were published.

    The command line prints it without a traceback and exits with status 1.
    """
