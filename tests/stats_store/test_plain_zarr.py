"""Without this project: the very lines that docs/store.md shows read a store and reproduce the flow."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_entries import publish_random_entry

from sfm.stats_store.store import open_or_create_store

DOCS = Path(__file__).parents[2] / "docs" / "store.md"
ZARR, XARRAY = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)

PRINT = """
import sys
import numpy as np
np.save("flow.npy", np.asarray(flow))
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "sfm"))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a store in it that has a replaced, a removed and another dataset's entry too."""
    store = open_or_create_store(str(tmp_path / "store"))
    publish_random_entry(store, 1, dataset="birds")
    publish_random_entry(store, 2, dataset="birds", replace=True)
    publish_random_entry(store, 3, dataset="boats", fingerprint="b" * 64)
    return tmp_path


def run_flow_code(code: str, folder: Path) -> np.ndarray:
    """Run code in a process of its own, in which this project is never imported."""
    done = subprocess.run(
        [sys.executable, "-c", code + PRINT], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    return np.load(folder / "flow.npy")


def compute_expected_flow(folder: Path) -> np.ndarray:
    """The flow by its definition, from this project's reader: others' mean minus own."""
    store = open_or_create_store(str(folder / "store"))
    (summary,) = [s for s in store.list_summaries() if s.dataset == "birds"]
    mean = store.open_entry(summary).read_array("train/mean")
    return np.array([np.delete(mean, c, axis=0).mean(axis=0) - mean[c] for c in range(len(mean))])


def test_plain_zarr_computes_the_flow_in_ten_lines(folder):
    assert len([line for line in ZARR.splitlines() if line.strip()]) <= 10
    np.testing.assert_allclose(run_flow_code(ZARR, folder), compute_expected_flow(folder), rtol=1e-12)


def test_plain_xarray_computes_the_flow_with_named_dimensions(folder):
    search = "".join(
        line for line in ZARR.splitlines(keepends=True) if not line.startswith(("run", "mean", "flow"))
    )
    np.testing.assert_allclose(
        run_flow_code(search + XARRAY, folder), compute_expected_flow(folder), rtol=1e-12
    )


def test_xarray_opens_every_group_of_a_real_entry(fashion_store):
    code = f"""
import json, xarray
from pathlib import Path
commits = [json.loads(p.read_text())["commit"] for p in Path({fashion_store!r}).glob("index/*/*/*/*.json")]
for commit in commits:
    tree = xarray.open_datatree(
        f"{fashion_store}/runs/{{commit['run']}}", engine="zarr", consolidated=False, chunks=None
    )
    for name in commit["arrays"]:
        assert tree[name].load().size > 0, name
    flow = tree["train/centre_3"].dims
    assert flow == ("class", "sub_class_3", "feature")
"""
    assert run_flow_code(code, Path(fashion_store).parent).tolist() == ["class", "sub_class_3", "feature"]
