"""Settings for every test: reproducible property tests with 500 examples each, one thread per worker, no stray warnings."""

import json
import os
import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

hypothesis.settings.register_profile(
    "ci", max_examples=500, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
)
hypothesis.settings.register_profile("quick", parent=hypothesis.settings.get_profile("ci"), max_examples=50)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(Path(__file__).parent / "golden" / "qig"), help="directory of recorded calibrations to compare with")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("cases/*.json"))
        metafunc.parametrize("golden_case", files, ids=[f.stem for f in files])


@pytest.fixture(autouse=True)
def _seed_and_fresh_compiler() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, coco.jsonl and images/, for the command line."""
    from PIL import Image

    from tests.tiny_dirs import directory

    root = tmp_path_factory.mktemp("tiny")
    directory("llava_onevision", root / "model")
    weights = load_file(root / "model" / "model.safetensors")
    matters = ("language_model.layers", "lm_head")  # made so: a random decoder hardly changes what is said
    strong = {name: 5 * t if t.dim() == 2 and any(part in name for part in matters) else t for name, t in weights.items()}
    save_file(strong, root / "model" / "model.safetensors", {"format": "pt"})
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        width, height = rng.integers(24, 90, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"{i} noisy things"})
    (root / "coco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the same, to be changed at will."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
