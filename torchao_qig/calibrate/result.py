"""`Calibration`: what was found. Saved as calibration.safetensors and calibration.json; applied by `torchao.quantize_`."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchao_qig._compat import tensor_class
from torchao_qig.errors import UserError, UserFileError
from torchao_qig.formats.activations import INT8
from torchao_qig.tensor import PackedIntTensor
from torchao_qig.tensor.packed import DATA

FORMAT = 3  # of the files
MODALITIES = {"padding": 0, "text": 1, "vision": 2, "answer": 3}


@dataclass
class GroupResult:
    """One group of linears. Names are full names in the calibrated model.

    Attributes:
        label: the inspected module; the first linear where two groups share one.
        block: the block it lies in.
        linears: the linears that share the scale.
        inspected: the module at whose output the error was measured.
        weighting: "qig", "modality", "uniform" or "none".
        fold_kind, fold_into: where the scale goes; "act_pre_scale" and "" where no producer takes it.
        ratio: the winner.
        losses: candidate number -> loss, of those evaluated on all samples. 0 is plain rounding.
        x_mean: mean magnitude of the input's channels.
        scale: the equalization scale, float32.
    """

    label: str
    block: str
    linears: list[str]
    inspected: str
    weighting: str
    fold_kind: str
    fold_into: str
    ratio: float
    winner: int
    losses: dict[int, float]
    x_mean: Tensor
    scale: Tensor

    @property
    def loss(self) -> float:
        return self.losses.get(self.winner, float("nan"))

    @property
    def rounding_loss(self) -> float:
        """The loss of plain rounding."""
        return self.losses.get(0, float("nan"))


@dataclass
class TokenWeights:
    """Weights of a group's tokens, sample by sample, in the loader's order.

    Attributes:
        weights: per sample (T,), summing to 1; padding has 0.
        modality: per sample (T,), values of MODALITIES.
        completeness_error: per sample, by how much the attributions miss the total they should add up to, relative to it
            (NaN for weights that are no integrated gradients, and with int8 activations, where there is no such total).
    """

    weights: list[Tensor]
    modality: list[Tensor]
    completeness_error: Tensor


@dataclass
class Calibration:
    """The result of `calibrate`.

    Attributes:
        groups: by label, in the order of the blocks.
        grids: linear -> [bits, group_size, symmetric], with "int8 activations" after that where they are.
        tokens: label -> per sample weights.
        modality: per sample what each token is.
        completeness: label -> per sample error.
        weights: linear -> its packed weight, where calibration chose the integers (`clip`, `compensate`).
        squared_errors: label -> what that was about: the weighted squared error of rounding to nearest, and of these integers.
        settings: the config's public fields.
        stats: seconds, peak memory, number of samples and tokens, versions.
    """

    groups: dict[str, GroupResult] = field(default_factory=dict)
    grids: dict[str, list[Any]] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    modality: list[Tensor] = field(default_factory=list)
    completeness: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, TorchAOBaseTensor] = field(default_factory=dict)
    squared_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    def group_of(self, name: str) -> GroupResult:
        """The group with this label, or the one that this linear belongs to."""
        if name in self.groups:
            return self.groups[name]
        for group in self.groups.values():
            if name in group.linears:
                return group
        raise KeyError(f"name={name!r}: no such group or linear; there are {', '.join(self.groups) or 'none'}")

    def token_weights(self, name: str) -> TokenWeights:
        """How much each token counted for the group of a module, e.g. "model.layers.3.mlp"."""
        group = self.group_of(name)
        if group.label not in self.tokens:
            raise KeyError(f"name={name!r}: no token weights were recorded (sensitivity={group.weighting!r})")
        weights = self.tokens[group.label]
        fits = [len(m) == len(w) for m, w in zip(self.modality, weights, strict=False)]
        modality = self.modality if len(self.modality) == len(weights) and all(fits) else [torch.ones_like(w, dtype=torch.uint8) for w in weights]
        error = self.completeness.get(group.label, torch.full((len(weights),), torch.nan))
        return TokenWeights(weights, modality, error)

    def of_block(self, block: str) -> "Calibration":
        """What was found in one block."""
        labels = [label for label, g in self.groups.items() if g.block == block]

        def inside(found: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in found.items() if not block or k == block or k.startswith(f"{block}.")}

        return Calibration(
            groups={k: self.groups[k] for k in labels},
            tokens={k: v for k, v in self.tokens.items() if k in labels},
            completeness={k: v for k, v in self.completeness.items() if k in labels},
            weights=inside(self.weights),
            squared_errors=inside(self.squared_errors),
        )

    def add(self, other: "Calibration") -> None:
        """Take over what was found in another block."""
        self.groups |= other.groups
        self.tokens |= other.tokens
        self.completeness |= other.completeness
        self.weights |= other.weights
        self.squared_errors |= other.squared_errors

    def summary(self) -> str:
        """One line per group: what the choice of integers leaves of rounding's squared error; the loss of plain rounding, that of the
        scale chosen, its ratio and where it went. Then what it took."""
        labels = list(dict.fromkeys([*self.groups, *self.squared_errors]))
        width = max((len(label) for label in labels), default=5)
        columns = ["left  "] * bool(self.squared_errors) + ["weights   rounding    chosen  ratio  scale in"] * bool(self.groups)
        lines = [f"{'group':{width}}  {'  '.join(columns)}"]
        for label in labels:
            line = f"{label:{width}}  "
            if self.squared_errors:
                before, after = self.squared_errors.get(label, (float("nan"),) * 2)
                line += f"{after / max(before, 1e-300):6.1%}  "
            if label in self.groups:
                g = self.groups[label]
                line += f"{g.weighting:8} {g.rounding_loss:9.3e} {g.loss:9.3e}  {g.ratio:5.2f}  {g.fold_into or g.fold_kind}"
            lines.append(line.rstrip())
        if "seconds" in self.stats:
            device = f", {self.stats['peak_device_bytes'] / 2**20:.0f} MiB on the device" if "peak_device_bytes" in self.stats else ""
            lines.append(f"{self.stats['samples']} samples, {self.stats['seconds']:.1f} s, peak memory {self.stats['peak_host_bytes'] / 2**20:.0f} MiB{device}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write calibration.safetensors and calibration.json into a directory."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        groups = []
        for number, g in enumerate(self.groups.values()):
            tensors |= {f"{number}.x_mean": g.x_mean, f"{number}.scale": g.scale}
            groups.append({k: v for k, v in asdict(g).items() if not isinstance(v, Tensor)})
            if g.label in self.completeness:
                tensors[f"{number}.completeness"] = self.completeness[g.label]
            if g.label in self.tokens:
                tensors |= _packed(f"{number}.weights", self.tokens[g.label])
        tensors |= _packed("modality", self.modality)
        for name, w in self.weights.items():
            tensors |= {f"{name}.{data}": getattr(w, data) for data in w.tensor_data_names}
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        described = {
            "format": FORMAT, "groups": groups, "grids": self.grids, "weights": {name: _described(w) for name, w in self.weights.items()},
            "squared_errors": self.squared_errors,
            "settings": self.settings, "stats": self.stats,
        }  # fmt: skip
        _replace(directory / "calibration.safetensors", lambda p: save_file(tensors, p))
        _replace(directory / "calibration.json", lambda p: p.write_text(json.dumps(described, indent=1)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read what `save` wrote."""
        directory = Path(path)
        try:
            described = json.loads((directory / "calibration.json").read_text())
        except FileNotFoundError:
            raise UserFileError(f"path={str(path)!r}: no calibration.json there; pass the directory that Calibration.save wrote") from None
        if described["format"] != FORMAT:
            raise UserError(
                f"path={str(path)!r}: format {described['format']}, this version reads {FORMAT}; calibrate again or install the version that wrote it"
            )
        tensors = load_file(directory / "calibration.safetensors")
        found = cls(grids=described["grids"], settings=described["settings"], stats=described["stats"], modality=_unpacked("modality", tensors))
        found.squared_errors = {label: (before, after) for label, (before, after) in described["squared_errors"].items()}
        for name, shape in described["weights"].items():
            found.weights[name] = _weight(shape, {data.removeprefix(f"{name}."): t for data, t in tensors.items() if data.rpartition(".")[0] == name})
        for number, fields in enumerate(described["groups"]):
            fields["losses"] = {int(k): v for k, v in fields["losses"].items()}
            group = GroupResult(**fields, x_mean=tensors[f"{number}.x_mean"], scale=tensors[f"{number}.scale"])
            found.groups[group.label] = group
            if f"{number}.completeness" in tensors:
                found.completeness[group.label] = tensors[f"{number}.completeness"]
            if f"{number}.weights.lengths" in tensors:
                found.tokens[group.label] = _unpacked(f"{number}.weights", tensors)
        return found


def _described(weight: TorchAOBaseTensor) -> Any:
    """A packed weight without its tensors."""
    if isinstance(weight, PackedIntTensor):
        return [weight.bits, weight.group_size, weight.rows, weight.columns, *[INT8] * weight.int8_activations]
    return {"type": type(weight).__name__, **{name: getattr(weight, name) for name in weight.tensor_attribute_names}}


def _weight(described: Any, data: dict[str, Tensor]) -> TorchAOBaseTensor:
    """A packed weight from its description and its tensors."""
    if isinstance(described, dict):
        attributes = {k: v for k, v in described.items() if k != "type"}
        return tensor_class(described["type"])(**data, **attributes)
    weight = PackedIntTensor(*(data[name] for name in DATA), *described[:4])
    weight.int8_activations = INT8 in described
    return weight


def _packed(name: str, rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths as two tensors."""
    rows = list(rows)
    return {name: torch.cat(rows) if rows else torch.empty(0), f"{name}.lengths": torch.tensor([len(r) for r in rows], dtype=torch.int64)}


def _unpacked(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    return list(tensors[name].split(tensors[f"{name}.lengths"].tolist()))


def _replace(path: Path, write: Any) -> None:
    """Write a file so that it is either the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
