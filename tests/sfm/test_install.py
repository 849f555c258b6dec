"""The installed package: one import name, and no clash with what users keep on their path."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(out), str(ROOT)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_contains_only_the_sfm_package_with_data_and_py_typed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sfm"}
    for wanted in (
        "sfm/py.typed",
        "sfm/pipeline/extract.py",
        "sfm/eval/evaluation.py",
        "sfm/eval/report/template/page.html",
        "sfm/eval/export/template/dataset.md",
        "sfm/pipeline/data/fashion_mnist_6k/train-images-idx3-ubyte.gz",
        "sfm/pipeline/data/fashion_mnist_6k/LICENSE",
    ):
        assert wanted in names
    embedded = [zipfile.ZipFile(wheel).getinfo(n).file_size for n in names if "/data/" in n]
    assert sum(embedded) <= 3_000_000


def test_user_modules_named_like_subpackages_do_not_shadow_the_package(wheel, tmp_path):
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # The dependencies come from this environment; this package comes from the wheel alone.
    zipfile.ZipFile(wheel).extractall(site)
    borrowed = Path(pytest.__file__).parents[1]
    (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    work = tmp_path / "work"
    (work / "pipeline").mkdir(parents=True)
    (work / "eval.py").write_text(
        "raise SystemExit('the user's eval.py was imported')".replace("user's", "users")
    )
    (work / "pipeline" / "__init__.py").write_text("raise SystemExit('the users pipeline was imported')")
    code = (
        "import sys; sys.path.insert(0, ''); sys.argv = ['sfm', '--help']\n"
        "import sfm.pipeline.extract, sfm.eval.evaluation, sfm.distill.run\n"
        "assert 'purelib' not in sfm.__file__ and sfm.__file__.startswith(sys.prefix), sfm.__file__\n"
        "from sfm.cli import main; main()"
    )
    done = subprocess.run([python, "-c", code], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "quickstart" in done.stdout
