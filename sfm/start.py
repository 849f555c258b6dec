"""What the command ``sfm`` starts with: nothing else is imported before Ctrl-C is handled."""

from sfm.interrupts import take_signals


def main() -> None:
    """Run the command line."""
    take_signals()
    from sfm.cli import main as run

    run()
