"""Contracts as test classes, which this package's tests and plug-ins inherit. They need pytest."""

import pytest

pytest.register_assert_rewrite("sfm.testing.sources", "sfm.testing.stores")

from sfm.testing.sources import SourceTests  # noqa: E402
from sfm.testing.stores import StoreTests  # noqa: E402

__all__ = ["SourceTests", "StoreTests"]
