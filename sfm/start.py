"""Entry point of the command ``sfm``: nothing else is imported before Ctrl-C is handled."""

from sfm.interrupts import install_sigint_and_sigterm_handlers


def main() -> None:
    """Run the command line."""
    install_sigint_and_sigterm_handlers()
    from sfm.cli import main as run

    run()
