"""The guided tour of docs/contributing.md names the files that a real run enters, and no others."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torchao.quantization import quantize_

import torchao_qig
from tests.docs.pages import DOCS, ROOT
from tests.tiny_models import qwen2
from torchao_qig import QIGWeightOnlyConfig

PACKAGE = Path(torchao_qig.__file__).parent
COMPILED = "`torch.compile(model)` and a forward pass:"


def told(text: str) -> set[str]:
    return set(re.findall(r"^ *([\w/]+\.py) ", text, re.MULTILINE))


def test_the_tour_is_the_way_that_a_call_takes() -> None:
    tour = (DOCS / "contributing.md").read_text().split("## A guided tour")[1].split("With another method, other files")[0]
    before, after = tour.split(COMPILED)
    for file in told(tour):
        importlib.import_module(f"torchao_qig.{file.removesuffix('.py').replace('/', '.')}")  # what runs on import is no part of the call
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)) and frame.f_code.co_name != "<module>":
            entered.add(Path(path).relative_to(PACKAGE).as_posix())

    model, inputs = qwen2()
    sys.setprofile(note)
    try:
        quantize_(model, QIGWeightOnlyConfig(bits=3, group_size=64, calib=[inputs], verbose=False))
    finally:
        sys.setprofile(None)

    assert told(before) == entered
    assert told(after) == {"tensor/products.py", "tensor/linear.py", "tensor/lowering.py"}
    assert all((ROOT / "torchao_qig" / file).is_file() for file in told(tour))
