"""`Calibration`: the result of a calibration. It is saved as calibration.safetensors and calibration.json, and applied by `torchao.quantize_`."""

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
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.group_result import GroupResult
from torchao_qig.tensor import PackedIntTensor
from torchao_qig.tensor.packed import DATA

FORMAT = 3  # version of the files


@dataclass
class TokenWeights:
    """Weights of a group's tokens, sample by sample, in the loader's order.

    Attributes:
        weights: per sample (T,); padding has 0. They sum to 1 for each sample, except those of `Modality` and with `paper_rules`.
        modality: per sample (T,), values of MODALITIES.
        completeness_error: per sample, by how much the attributions miss the total that they should add up to, relative to it.
            It is NaN for weights that are no integrated gradients, and with int8 activations, where there is no such total.
    """

    weights: list[Tensor]
    modality: list[Tensor]
    completeness_error: Tensor


@dataclass
class Calibration:
    """The result of `calibrate`.

    Attributes:
        groups: label of a group -> its scale and how it was found, in the order of the blocks.
        grids: linear -> [bits, group_size, symmetric], or [a torchao config]; then "int8 activations" where inputs are rounded.
        tokens: label -> token weights, per sample.
        modality: per sample, what each token is (values of MODALITIES).
        completeness: label -> completeness errors of the token weights, per sample.
        weights: linear -> its packed weight, where calibration chose the codes (`Compensate`, `Clip`).
        squared_errors: label -> the weighted squared error of the outputs: of rounding to nearest, and of the codes chosen.
        settings: what the config says to compute (`public()`).
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
        """The part of this calibration that is about one block."""
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

    def add(self, other: "Calibration | Draft") -> None:
        """Add the results of another block."""
        self.groups |= other.groups
        self.tokens |= other.tokens
        self.completeness |= other.completeness
        self.weights |= other.weights
        self.squared_errors |= other.squared_errors

    def summary(self) -> str:
        """Text with one line per group, then the time and memory taken.

        Where codes were chosen, a line has the part of plain rounding's squared error that remains. Where a scale was chosen, it has the kind of
        token weights, the losses of plain rounding and of the scale, the scale's ratio and the module that the scale went into.
        """
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
    """The attributes of a packed weight, without its tensors."""
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
    """Tensors of different lengths as two: all values, and the lengths."""
    rows = list(rows)
    return {name: torch.cat(rows) if rows else torch.empty(0), f"{name}.lengths": torch.tensor([len(r) for r in rows], dtype=torch.int64)}


def _unpacked(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that `_packed` was given."""
    return list(tensors[name].split(tensors[f"{name}.lengths"].tolist()))


def _replace(path: Path, write: Any) -> None:
    """Write a file by way of a temporary one, so that an interruption leaves either the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
