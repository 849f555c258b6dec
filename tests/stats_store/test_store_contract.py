"""The contract of a store, on a disk, in memory and on an S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from s3_faults import run_fault_proxy

from sfm.testing import StoreTests


class TestStoreOnDisk(StoreTests):
    @pytest.fixture
    def location(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")


class TestStoreInMemory(StoreTests):
    @pytest.fixture
    def location(self) -> MemoryStore:
        return MemoryStore()


class TestStoreOnS3(StoreTests):
    @pytest.fixture
    def location(self, s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        # The proxy makes conditional writes atomic, as on S3: moto looks first and writes then.
        with run_fault_proxy(s3_endpoint) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            yield s3_url
