"""Entry point of the command ``sfm``: nothing else is imported before Ctrl-C is handled."""

from sfm.interrupts import install_signal_handlers


def main() -> None:
    """Run the command line."""
    install_signal_handlers()
    from sfm.cli import main as run

    run()
