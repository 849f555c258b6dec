"""What a person sees of an error: one line, of bounded length, and never a traceback for want of memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import typer

from sfm.error_reporting import MAX_ERROR_LENGTH, exit_on_error
from sfm.errors import InputError


def fill_with_numpy() -> None:
    np.empty(2**50)


def fill_with_torch() -> None:
    torch.empty(2**50)


def name_without_end() -> None:
    raise InputError("no dataset " + "x" * 10**6)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (fill_with_numpy, "error: not enough memory: "),
        (fill_with_torch, "error: not enough memory: "),
        (name_without_end, "error: no dataset xxx"),
    ],
)
def test_an_error_is_one_line_of_bounded_length(
    capsys: pytest.CaptureFixture[str], fault: Callable[[], None], told: str
) -> None:
    with pytest.raises(typer.Exit) as end, exit_on_error():
        fault()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.exit_code == 2
    assert line.startswith(told)
    assert len(line) <= MAX_ERROR_LENGTH + len("error: ")
