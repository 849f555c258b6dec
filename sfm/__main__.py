"""``python -m sfm``: the command line, and what ``torchrun -m sfm`` starts."""

import os
from contextlib import redirect_stdout
from pathlib import Path

from sfm.cli import main

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        main()
    else:
        # Of the processes that torchrun starts, all know the result; the first one says it.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            main()
