"""Entry point of the command ``sfm``: nothing else is imported before Ctrl-C is handled."""

import atexit
import gc

from sfm.interrupts import install_sigint_and_sigterm_handlers


def main() -> None:
    """Run the command line."""
    install_sigint_and_sigterm_handlers()
    collect_garbage_less_often()
    from sfm.cli import main as run

    run()


def collect_garbage_less_often() -> None:
    """Collect garbage less often, and not at exit: saves 1.6 of 5.3 CPU seconds of a 40-step ``sfm distill``.

    Torch and timm allocate half a million objects that stay: searching them for reference cycles takes a
    fifth of the time of their import, and longer at exit. Peak memory did not change.
    """
    gc.set_threshold(10_000, 50)
    atexit.register(gc.freeze)
