"""``python -m sfm``: the command line, and what ``torchrun -m sfm`` starts."""

from sfm.interrupts import install_sigint_and_sigterm_handlers

install_sigint_and_sigterm_handlers()

import os  # noqa: E402
from contextlib import redirect_stdout  # noqa: E402
from pathlib import Path  # noqa: E402

from sfm.start import main  # noqa: E402

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        main()
    else:
        # All processes that torchrun starts know the result; rank 0 prints it.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            main()
