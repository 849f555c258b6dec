"""The public library: importing it is quick, and every name is there."""

import subprocess
import sys

import pytest

import sfm.api


def test_importing_the_library_and_its_configs_does_not_import_torch_or_sklearn() -> None:
    code = (
        "import sys\n"
        "from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, open_store\n"
        "print({'torch', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", sfm.api.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(sfm.api, name).__name__ == name
    assert name in dir(sfm.api)


def test_a_name_that_the_library_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'sfm\.api' has no attribute 'distil'"):
        sfm.api.distil  # noqa: B018
