"""What a person sees of an error: one line, of bounded length, and never a traceback for want of memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import typer

from sfm.error_reporting import MAX_ERROR_LENGTH, exit_on_error
from sfm.errors import InputError


def exhaust_memory_with_numpy() -> None:
    np.empty(2**50)


def exhaust_memory_with_torch() -> None:
    torch.empty(2**50)


def raise_long_error() -> None:
    raise InputError("no dataset " + "x" * 10**6)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (exhaust_memory_with_numpy, "error: not enough memory: "),
        (exhaust_memory_with_torch, "error: not enough memory: "),
        (raise_long_error, "error: no dataset xxx"),
    ],
)
def test_error_is_one_line_of_bounded_length_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], fault: Callable[[], None], message: str
) -> None:
    with pytest.raises(typer.Exit) as end, exit_on_error():
        fault()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.exit_code == 2
    assert line.startswith(message)
    assert len(line) <= MAX_ERROR_LENGTH + len("error: ")
