"""The benchmark of the execution layer leaves out what exists."""

import pytest
from execution import OPTIMISATIONS, without


@pytest.mark.parametrize("name", OPTIMISATIONS)
def test_every_optimisation_can_be_disabled(name: str) -> None:
    with without(name):
        for target, attribute, value in OPTIMISATIONS[name]:
            assert getattr(target, attribute) is value
