"""``python -m sfm``: the command line, and what ``torchrun -m sfm`` starts."""

import os
import sys
from pathlib import Path

from sfm.cli import main

if __name__ == "__main__":
    # Of the processes that torchrun starts, all know the result; one says it.
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = Path(os.devnull).open("w")
    main()
