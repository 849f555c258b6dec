"""Ctrl-C and SIGTERM end the command line with one line and status 130, from its first moment on."""

import os
import signal
from types import FrameType

_interrupts_are_reported = False


def install_signal_handlers() -> None:
    """Handle SIGINT and SIGTERM, where Python handles them as it does by default.

    A shell that starts a command in the background has it ignore SIGINT; so it stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle_signal)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _handle_signal)


def allow_keyboard_interrupt() -> None:
    """Let a KeyboardInterrupt pass from now on, because somebody will turn it into a line."""
    global _interrupts_are_reported
    _interrupts_are_reported = True


def _handle_signal(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but end at once where it would get lost, or show a traceback.

    While modules are imported, extensions turn it into errors of their own, and destructors print it and go
    on. Nothing that a killed process could not leave as well is lost.
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
