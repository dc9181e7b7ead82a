"""Settings for every test: reproducible property tests with 500 examples each, one thread per worker, no stray warnings."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

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
