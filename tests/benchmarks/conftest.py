"""The benchmarks' own modules are imported as the benchmarks do: from their folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
