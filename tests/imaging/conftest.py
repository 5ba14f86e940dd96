"""Real series, unpacked once, and an empty study to add series to."""

import tarfile
from pathlib import Path

import pytest

from tests.imaging import synthetic
from tests.imaging.studies import Study


@pytest.fixture(scope="session")
def ct_data(shared_data: Path) -> Path:
    """The folder of real CT objects with its index."""
    return shared_data / "ct"


@pytest.fixture(scope="session")
def real_series(ct_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sub-folder for each real series archive."""
    root = tmp_path_factory.mktemp("series")
    for archive in sorted((ct_data / "series").iterdir()):
        with tarfile.open(archive, "r:*") as tar:
            tar.extractall(root / archive.name.split(".")[0], filter="data")
    return root


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def a_study(tmp_path: Path) -> Study:
    """A study without series yet."""
    return Study(tmp_path, synthetic.new_uids(), [], [])
