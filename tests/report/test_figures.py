"""What calibrations say: names as places, bits, scales, errors and sizes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_models
from torchao_qig import Calibration, Equalize, QIGWeightOnlyConfig, calibrate, report
from torchao_qig.report import colours, tables
from torchao_qig.report.names import Place, place, rows
from torchao_qig.report.weights import by_modality, views

ATTENTION = "model.language_model.layers.1.self_attn"


@pytest.fixture(scope="module")
def scaled() -> Calibration:
    """Scales searched, bits mixed by hand."""
    model, batch = tiny_models.qwen2()
    found = calibrate(model, [batch], QIGWeightOnlyConfig(bits=4, group_size=64, steps=[Equalize("qig", grid=4)], verbose=False))
    found.grids["model.layers.1.mlp.down_proj"][0] = 8
    return found


def test_names_are_places() -> None:
    assert place(f"{ATTENTION}.q_proj") == Place("model.language_model.layers", 1, "self_attn.q_proj")
    assert place("model.layers.3") == Place("model.layers", 3, "layer")
    assert place("model.layers.3.experts.17.up_proj").kind == "experts.*.up_proj"
    assert place("lm_head") == Place("", None, "lm_head")


@given(st.permutations([f"model.layers.{i}.mlp" for i in range(12)] + ["lm_head"]))
def test_rows_are_in_the_order_of_layers(names: list[str]) -> None:
    assert list(rows(names).values()) == [*map(str, range(12)), "-"]


def test_two_stacks_keep_their_names() -> None:
    assert rows(["visual.blocks.0.fc", "model.layers.0.mlp"]) == {"visual.blocks.0.fc": "visual.blocks 0", "model.layers.0.mlp": "model.layers 0"}


@given(st.floats(1e-6, 1e6), st.sampled_from(colours.REACHES))
def test_levels_follow_weights(weight: float, reach: float) -> None:
    level = int(colours.level(np.array([weight]), reach)[0])
    middle = colours.LEVELS // 2
    assert 0 <= level < colours.LEVELS
    assert (level - middle) * math.log2(weight) >= 0
    assert int(colours.level(np.array([1 / weight]), reach)[0]) == colours.LEVELS - 1 - level
    if abs(math.log2(weight)) >= reach:
        assert level in (0, colours.LEVELS - 1)


@given(st.integers(0, 2**60))
def test_sizes_have_three_digits(count: int) -> None:
    value, unit = tables.size(count).split()
    assert float(value) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit) == pytest.approx(count, rel=0.0051, abs=0.5)


def test_scales_and_bits_are_drawn(scaled: Calibration, tmp_path: Path) -> None:
    """A calibration with token weights serves for both; ratios and mixed bits have figures."""
    scaled.save(tmp_path / "qig" / "calibration")
    text = report.write(tmp_path).read_text()
    assert {p.stem for p in (tmp_path / "qig" / "report").glob("*.svg")} == {"sensitivity", "errors", "ratios", "bits", "time"}
    moved = sum(g.ratio != 0 for g in scaled.groups.values())
    assert moved > 0
    assert f"Scales were searched for {len(scaled.groups)} groups; {moved} of them take one." in text
    assert "4 to 8 bits" in text
    assert "1 linears at 8 bits" in text
    assert "qig/sensitivity" not in text


def test_a_text_model_has_no_pictures(scaled: Calibration) -> None:
    assert {kind for means in by_modality(scaled).values() for kind in means} == {"text"}
    assert all(mean == pytest.approx(1) for means in by_modality(scaled).values() for mean in means.values())


def test_folds_are_counted(scaled: Calibration) -> None:
    found = tables.folds(scaled)
    assert found is not None
    assert sum(int(row[-1]) for row in found.rows) == sum(g.ratio != 0 for g in scaled.groups.values())
    assert any("norm before" in row[1] for row in found.rows)


def test_errors_are_squared_errors_where_integers_were_chosen(complete: Path) -> None:
    calibration = Calibration.load(complete / "qig" / "calibration")
    errors, what, _ = tables.before_after(calibration)
    assert what == "squared error"
    assert errors == calibration.squared_errors
    table = tables.groups(calibration, {})
    assert table is not None
    before, after = calibration.squared_errors[ATTENTION]
    assert f"{after / before:.1%}" in next(row for row in table.rows if row[0] == ATTENTION)


def test_relative_weights_average_to_one(complete: Path) -> None:
    """Over the tokens of a sample, whatever their kinds."""
    calibration = Calibration.load(complete / "qig" / "sensitivity")
    for label, means in by_modality(calibration).items():
        found = calibration.token_weights(label)
        counts = {kind: sum(int((m == code).sum()) for m in found.modality) for kind, code in (("text", 1), ("vision", 2), ("answer", 3))}
        total = sum(means[kind] * n for kind, n in counts.items())
        assert total == pytest.approx(sum(counts.values()), rel=1e-4)
    assert [v.labels for v in views(calibration)[1:]] == [[label] for label in calibration.tokens]


def test_average_bits_need_shapes(complete: Path) -> None:
    calibration = Calibration.load(complete / "qig" / "calibration")
    assert tables.bits_text(calibration) == "14 linears at 3 bits, groups of 64, asymmetric."
    name = "model.language_model.layers.0.mlp.up_proj"
    calibration.grids[name][0] = 5
    sizes = {k: w.rows * w.columns for k, w in calibration.weights.items()}
    assert f"On average {3 + 2 * sizes[name] / sum(sizes.values()):.2f} bits per weight." in tables.bits_text(calibration)


def test_missing_libraries_are_named() -> None:
    """Each in turn, in a process of its own."""
    check = (
        "import sys\n"
        "for library in ('matplotlib', 'PIL', 'jinja2'):\n"
        "    for module in [m for m in sys.modules if m.startswith('torchao_qig.report')]: del sys.modules[module]\n"
        "    sys.modules[library] = None\n"
        "    from torchao_qig.report import write\n"
        "    try: write('nowhere')\n"
        "    except ModuleNotFoundError as error: print(error)\n"
        "    del sys.modules[library]\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    named = [f'the report needs {library}: pip install "torchao_qig[recipes]"' for library in ("matplotlib", "PIL", "jinja2")]
    assert done.stdout.splitlines() == named
