"""The rooms: imports point down the list of DESIGN.md, serving stays light, torchao's internals are touched in one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchao_qig
import torchao_qig_cli

PACKAGE = Path(torchao_qig.__file__).parent
COMMAND_LINE = Path(torchao_qig_cli.__file__)
ORDER = [
    "torchao_qig_cli",
    "report.page",
    "report.cards",
    "report.tables",
    "report.figures",
    "report.weights",
    "report.read",
    "report.patches",
    "report.names",
    "report.colours",
    "report",
    "lvlm.quantize",
    "lvlm.explain",
    "lvlm.evaluate",
    "lvlm.bench",
    "lvlm.serve",
    "lvlm.harness",
    "lvlm.command",
    "lvlm.card",
    "lvlm.check",
    "lvlm.recipe",
    "lvlm.data",
    "lvlm.chat",
    "lvlm.mixes",
    "lvlm.samples",
    "lvlm.rows",
    "lvlm.messages",
    "lvlm.pictures",
    "lvlm.load",
    "lvlm.stored",
    "lvlm",
    "__init__",
    "workflow",
    "calls",
    "calibration.run",
    "calibration.chain",
    "calibration.quantized_model",
    "calibration.resume",
    "calibration.apply",
    "calibration.result",
    "calibration.plan",
    "calibration.estimate",
    "calibration.job",
    "calibration",
    "integrations",
    "config",
    "stored_config",
    "methods.__init__",
    "methods.fit",
    "methods.plain",
    "methods.presets",
    "methods.smooth",
    "methods.equalize",
    "methods.compensate",
    "methods.step",
    "methods.allocate",
    "methods.weigh",
    "methods.per_sample",
    "methods.token_weights.weighting",
    "methods.token_weights.integrated_gradients",
    "methods.nearest",
    "methods.context",
    "methods.token_weights.modality",
    "methods.token_weights.attribution",
    "methods.token_weights",
    "methods.draft",
    "methods.scales",
    "methods.fold",
    "methods.group_result",
    "methods.shared_weights",
    "methods.search",
    "methods.solver",
    "methods",
    "watch.quantized_stream",
    "watch.block",
    "watch.stream",
    "watch.chains",
    "watch.token_layout",
    "watch.groups",
    "watch.batches",
    "watch.recorder",
    "watch.observer",
    "watch.store",
    "watch.ranks",
    "watch",
    "formats.__init__",
    "formats.affine",
    "formats.foreign",
    "formats.base",
    "formats.activations",
    "formats",
    "tensor.ops",
    "tensor.products",
    "tensor.packed",
    "tensor.int8",
    "tensor.linear",
    "tensor.lowering",
    "tensor.packing",
    "tensor.affine",
    "_compat",
    "running",
    "system",
    "errors",
]
FILES = [*sorted(PACKAGE.rglob("*.py")), COMMAND_LINE]


def name_of(path: Path) -> str:
    return path.stem if path == COMMAND_LINE else ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> int:
    rank = [i for i, room in enumerate(ORDER) if module == room or module.startswith(f"{room}.")]
    return rank[0] if rank else -1


def imports(path: Path) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=name_of)
def test_imports_point_down(path: Path) -> None:
    """A room imports only rooms below it."""
    mine = room_of(name_of(path))
    assert mine >= 0, f"{path} belongs to no room"
    for module, name in imports(path):
        if module.startswith("torchao_qig"):
            if module == "torchao_qig" and mine < room_of("__init__"):
                continue  # what stands above the library uses its public names
            below = f"{module}.{name}".removeprefix("torchao_qig").removeprefix(".")
            target = max(room_of(below), room_of(module.removeprefix("torchao_qig").removeprefix(".")))
            if below.split(".")[0] != "tensor" or target >= 0:
                assert target > mine or below == "tensor.PackedIntTensor", f"{path.name} imports {below}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "watch").glob("*.py")), ids=name_of)
def test_watching_knows_nothing_of_quantization(path: Path) -> None:
    for module, name in imports(path):
        if module.startswith("torchao_qig"):
            assert f"{module}.{name}".startswith(("torchao_qig.watch", "torchao_qig.errors"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_heavy_or_private_imports(path: Path) -> None:
    """The library itself needs torch and torchao; what is private to torchao lies in _compat."""
    for module, _ in imports(path):
        top = module.split(".")[0]
        assert top not in {"accelerate", "captum", "tests", "benchmarks"}
        assert top not in {"datasets", "matplotlib", "lmms_eval", "yaml", "PIL"} or {"lvlm", "report"} & set(path.parts)
        assert top != "recipes" or path == COMMAND_LINE  # the demo, which needs the repository
        if top == "transformers":
            assert {"integrations", "lvlm"} & set(path.parts)
        if module.startswith("torchao.") and module not in {"torchao.utils", "torchao.core.config", "torchao.quantization"}:
            assert path.name == "_compat.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_device_is_named(path: Path) -> None:
    """Any device: none is spelled out."""
    assert '"cuda' not in path.read_text()


def test_import_stays_light() -> None:
    """Importing the package imports neither transformers nor the compiler."""
    check = (
        "import sys, torchao; before = set(sys.modules); import torchao_qig;"
        "heavy = ('transformers', 'torch._inductor', 'torchao_qig.calibration', 'torchao_qig.calls', 'torchao_qig.methods', 'torchao_qig.watch');"
        "print([m for m in set(sys.modules) - before if m.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ("torch", "torchao", "transformers", "torchao_qig", "numpy", "yaml", "PIL", "datasets")
LIGHT = [[], ["--help"], ["quantise"], ["bench", "--no-such-option"], ["evaluate", "--reference", "m", "m"]]
LIGHT += [[command.callback.__name__, "--help"] for command in torchao_qig_cli.app.registered_commands if command.callback]


def test_the_command_line_says_what_it_can_do_at_once() -> None:
    """What needs no model imports nothing that takes seconds."""
    check = (
        "import sys; from typer.testing import CliRunner; from torchao_qig_cli import app\n"
        f"for words in {LIGHT}:\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert isinstance(done.exception, SystemExit | None), done.exception\n"
        "    assert done.output\n"
        f"    print(words, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{words} []" for words in LIGHT]


def test_rounding_without_data_stays_light() -> None:
    """What a loader does with a saved config: no calibration is imported."""
    check = (
        "import sys, torch, torchao_qig; from torchao.quantization import quantize_;"
        "quantize_(torch.nn.Sequential(torch.nn.Linear(64, 16)), torchao_qig.PackedIntWeightOnlyConfig(bits=3, group_size=64, pre_scaled=True));"
        "quantize_(torch.nn.Sequential(torch.nn.Linear(64, 16)), torchao_qig.QIGWeightOnlyConfig(group_size=64));"
        "print([m for m in sys.modules if m.startswith(('torchao_qig.calibration', 'torchao_qig.calls', 'torchao_qig.methods', 'torchao_qig.watch'))])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_torchao_fails_in_one_place() -> None:
    """A torchao that moved an internal is named with its version and the advice."""
    check = "import torchao.quantization.quant_api as q; del q._fqn_to_config_handler\nimport torchao_qig"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "torchao_qig does not know torchao" in done.stderr
    assert "_fqn_to_config_handler" in done.stderr


def test_a_package_that_cannot_be_imported_is_said_once() -> None:
    """By the command line: one traceback, whose last line says what to do."""
    check = "import torchao.quantization.quant_api as q; del q._fqn_to_config_handler\nfrom torchao_qig_cli import app; app(['plan', 'model'])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: torchao_qig does not know torchao")
    assert done.stderr.count("During handling") == 0
