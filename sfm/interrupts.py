"""Signal handlers: Ctrl-C and SIGTERM end the command line with one line and status 130 from its start."""

import os
import signal
from types import FrameType

_interrupts_are_reported = False


def install_sigint_and_sigterm_handlers() -> None:
    """Handle SIGINT and SIGTERM, unless something other than Python's default handles them.

    A command that a shell starts in the background keeps ignoring SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise_keyboard_interrupt_or_exit)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_keyboard_interrupt_or_exit)


def make_signals_raise_keyboard_interrupt() -> None:
    """Raise KeyboardInterrupt on later signals, because the caller reports it."""
    global _interrupts_are_reported
    _interrupts_are_reported = True


def _raise_keyboard_interrupt_or_exit(_signal_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; exit at once where it would be lost or show a traceback.

    During imports, extensions replace it by other errors, and destructors print and ignore it. Exiting at
    once leaves the same state as a killed process.
    """
    if not _interrupts_are_reported or _is_importing(frame):
        os.write(2, b"error: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
