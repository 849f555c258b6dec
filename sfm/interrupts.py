"""Signal handlers: Ctrl-C and SIGTERM end the command line with one line and status 130 from its start."""

import os
import signal
from types import FrameType

_interrupts_are_reported = False


def install_signal_handlers() -> None:
    """Handle SIGINT and SIGTERM, unless something other than Python's default handles them.

    A command that a shell starts in the background keeps ignoring SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle_signal)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _handle_signal)


def raise_interrupt_on_signal() -> None:
    """From now on raise KeyboardInterrupt on a signal, because the caller reports it."""
    global _interrupts_are_reported
    _interrupts_are_reported = True


def _handle_signal(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; exit at once where it would be lost or show a traceback.

    While modules are imported, extensions turn it into errors of their own, and destructors print it and go
    on. Exiting at once leaves nothing that a killed process would not leave.
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
