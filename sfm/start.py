"""Entry point of the command ``sfm``: nothing else is imported before Ctrl-C is handled."""

from sfm.interrupts import interrupt_on_sigint_and_sigterm


def main() -> None:
    """Run the command line."""
    interrupt_on_sigint_and_sigterm()
    from sfm.cli import main as run

    run()
