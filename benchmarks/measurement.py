"""Helpers that several benchmarks share: progress lines, process memory, JSON files."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def log_progress(line: str) -> None:
    """Print a line with the time to stderr."""
    print(f"[{time.strftime('%X')}] {line}", file=sys.stderr, flush=True)


def read_process_bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes: "VmRSS" is resident memory, "VmHWM" its peak.

    Unlike ``getrusage``, the peak does not include that of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write the figures to a file, unless the path is None."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
