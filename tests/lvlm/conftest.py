"""What tests of this folder share: four pictures, and a cache of their own."""

import io
from pathlib import Path

import pytest
from PIL import Image

FILES = ["dog.png", "sub/cats.png", "bus.png"]


COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + i, 6), COLOURS[i]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with the three pictures; what tests write goes beside them."""
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(FILES):
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares goes into a temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
