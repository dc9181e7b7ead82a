"""Paper mode against the published rules in plain lines: other models, padding, losses, grids and weightings than the records have."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import torchao_qig
from tests.oracle import OfficialGroup, candidate_scales, integer_linear, integer_path_weights, official_asymmetric, paper_mode
from torchao_qig import QIG, Calibration, Modality, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig, Running
from torchao_qig.calibration.apply import changes, commit
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.fold import scaled_linear

B, T, H = 3, 12, 64
FLOAT32 = Running(compute_dtype=torch.float32)
SHAPE = {"hidden_size": H, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 64}


def build(kind: str, kv_heads: int) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    family = {"qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM), "llama": (hf.LlamaConfig, hf.LlamaForCausalLM)}[kind]
    model = family[1]._from_config(family[0](**SHAPE, num_key_value_heads=kv_heads), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.exp(torch.randn_like(p) * 0.3) if "norm" in name else torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.08) * (1 + p.abs()))
    return model


def batch(padded: bool) -> dict[str, Tensor]:
    x = torch.randn(B, T, H, generator=torch.Generator().manual_seed(5)) * torch.where(torch.arange(H) % 17 == 0, 8.0, 1.0)
    lengths = [T, T - 4, T - 1] if padded else [T] * B
    mask = torch.tensor([[int(t < n) for t in range(T)] for n in lengths])
    vision = torch.tensor([[int(1 <= t < 5) for t in range(T)]] * B) * mask
    answer = torch.tensor([[int(t >= 7) for t in range(T)]] * B) * mask
    return {"inputs_embeds": x * mask.unsqueeze(-1), "attention_mask": mask, "vision_mask": vision, "caption_mask": answer}


def groups(model: Any, inputs: dict[str, Tensor], bits: int, size: int) -> dict[str, OfficialGroup]:
    """The published groups of every block, with inputs recorded by hooks in a full-precision run."""
    found: dict[str, OfficialGroup] = {}
    seen: dict[str, tuple[Any, ...]] = {}
    layers = model.model.layers
    handles = [
        m.register_forward_pre_hook(lambda m, args, kwargs, name=name: seen.__setitem__(name, (args, kwargs)), with_kwargs=True)
        for name, m in model.named_modules()
    ]
    with torch.no_grad():
        model(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"])
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"model.layers.{i}"
        kwargs = {k: v for k, v in seen[f"{at}.self_attn"][1].items() if k not in ("hidden_states", "past_key_values", "use_cache")}

        def attend(m: Any, z: Tensor, kwargs: dict[str, Any] = kwargs) -> Tensor:
            return m(hidden_states=z, **kwargs)[0]

        def plain(m: Any, z: Tensor) -> Tensor:
            return m(z)

        def add(name: str, module: Any, linears: list[Any], call: Callable[..., Tensor], at: str = at) -> None:
            key = next(n for n, m in model.named_modules() if m is linears[0])
            found[f"{at}.{name}"] = OfficialGroup(module, linears, seen[key][0][0], call, bits, size)

        add("self_attn", attention, [attention.q_proj, attention.k_proj, attention.v_proj], attend)
        if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
            add("self_attn.o_proj", attention.o_proj, [attention.o_proj], plain)
        add("mlp", mlp, [mlp.gate_proj, mlp.up_proj], plain)
        add("mlp.down_proj", mlp.down_proj, [mlp.down_proj], plain)
    return found


def per_token(e: Tensor, squared: bool) -> Tensor:
    return (e.square() if squared else e.abs()).mean(-1)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "kv_heads"), [("qwen2", 4), ("qwen2", 2), ("llama", 4), ("llama", 1)])
def test_qig(kind: str, kv_heads: int, padded: bool, squared: bool) -> None:
    """Groups, mean inputs, token weights and all losses; the first five groups uniform over image and answer tokens."""
    size = 32 if padded else -1
    model, inputs = build(kind, kv_heads), batch(padded)
    config = paper_mode(QIGWeightOnlyConfig, {"loss": "mse" if squared else "mae"}, bits=3, group_size=size)
    found = torchao_qig.calibrate(model, [inputs], config)
    expected = groups(model, inputs, 3, size)
    assert list(found.groups) == list(expected)
    told = (inputs["vision_mask"] | inputs["caption_mask"]).float()
    for number, (label, group) in enumerate(expected.items()):
        w = group.token_weights() if number >= 5 else told / told.sum(1, keepdim=True)
        ours = torch.stack(found.token_weights(label).weights)
        assert (ours - w).abs().max() <= 1e-2 * w.mean()
        losses = group.losses(lambda e, w=w: (per_token(e, squared) * w).sum() / w.sum())
        torch.testing.assert_close(list(found.groups[label].losses.values()), losses, rtol=2e-3, atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_awq(masked: bool, padded: bool) -> None:
    """The repository's AWQ: mean squared error, of image tokens where they are known."""
    model, inputs = build("qwen2", 4), batch(padded)
    del inputs["caption_mask"]
    mask = inputs["vision_mask"].float() if masked else torch.ones(B, T)
    given = inputs if masked else {k: v for k, v in inputs.items() if k != "vision_mask"}
    config = paper_mode(QIGWeightOnlyConfig, {"loss": "mse", "sensitivity": "uniform"}, bits=4, group_size=32, running=FLOAT32)
    found = torchao_qig.calibrate(model, [given], config)
    for label, group in groups(model, inputs, 4, 32).items():
        losses = group.losses(lambda e: (per_token(e, True) * mask).sum() / mask.sum())
        torch.testing.assert_close(list(found.groups[label].losses.values()), losses, rtol=2e-3, atol=0)


@pytest.mark.parametrize("squared", [False, True])
def test_mbq(squared: bool) -> None:
    """The repository's MBQ, with given ratios; its two losses are normalised differently."""
    model, inputs, ratio = build("llama", 4), batch(True), {"attn": 0.3, "mlp": 1.7}
    changes = {"loss": "mse" if squared else "mae", "sensitivity": Modality(ratio)}
    config = paper_mode(QIGWeightOnlyConfig, changes, bits=3, group_size=32, running=FLOAT32)
    found = torchao_qig.calibrate(model, [inputs], config)
    answer, vision = inputs["caption_mask"].float(), inputs["vision_mask"].float()
    for label, group in groups(model, inputs, 3, 32).items():
        r = ratio["attn" if "attn" in label else "mlp"]

        def loss(e: Tensor, r: float = r) -> Tensor:
            e = per_token(e, squared)
            if squared:
                return (e * answer).sum() / answer.sum() + r * (e * vision).sum() / vision.sum()
            return ((e * answer).sum() + r * (e * vision).sum()) / (answer.sum() + vision.sum())

        torch.testing.assert_close(list(found.groups[label].losses.values()), group.losses(loss), rtol=2e-3, atol=0)


@pytest.mark.parametrize("weighting", ["modality", "qig"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_inputs_of_the_quantized_model(kv_heads: int, weighting: str) -> None:
    """The repository's distorted variant: scales so far applied, all linears rounded; losses against full-precision outputs."""
    model, inputs = build("llama", kv_heads), batch(False)
    changes = {"sensitivity": Modality(0.5) if weighting == "modality" else QIG("riemann", 32), "propagate_error": True}
    config = paper_mode(QIGWeightOnlyConfig, changes, bits=3, group_size=32, running=FLOAT32)
    found = torchao_qig.calibrate(model, [inputs], config)
    clean = groups(model, inputs, 3, 32)
    answer, vision = inputs["caption_mask"].float(), inputs["vision_mask"].float()
    so_far = Calibration()
    for number, (label, group) in enumerate(clean.items()):
        layer = label.split(".")[2]
        blocks = [n for n in linear_names(model) if int(n.split(".")[2]) <= int(layer)]
        bent = Draft(model, "", dict.fromkeys(blocks, config.form), so_far.groups.values()).module(model, torch.device("cpu"))
        distorted = list(groups(bent, inputs, 3, 32).values())[number]
        if weighting == "modality":
            w = (answer + 0.5 * vision) / (answer.sum() + vision.sum())
        else:
            w = group.token_weights() / B
        with torch.no_grad():
            reference = group._with({}, group.x)
        losses = []
        for s in candidate_scales(distorted.x):
            weights = {m: official_asymmetric(m.weight.detach() * s, 3, 32) / s for m in group.layers}
            with torch.no_grad():
                losses.append(float((per_token(reference - group._with(weights, distorted.x), False) * w).sum()))
        mine = found.groups[label]
        torch.testing.assert_close(mine.x_mean, distorted.x.abs().mean((0, 1)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(list(mine.losses.values()), losses, rtol=2e-3, atol=0)
        so_far.groups[label] = mine


@pytest.mark.parametrize(("method", "squared"), [("qig", False), ("qig", True), ("mbq", False), ("mbq", True), ("mbq distorted", False)])
@pytest.mark.parametrize(("kind", "kv_heads"), [("qwen2", 4), ("llama", 2)])
def test_int8_activations(kind: str, kv_heads: int, method: str, squared: bool) -> None:
    """The repository's W4A8: candidates with rounded inputs; QIG's path from the quantized model's input, the baseline of its losses, too."""
    model, inputs = build(kind, kv_heads), batch(False)
    distorted = method != "mbq"
    others = {} if method == "qig" else {"sensitivity": Modality(0.5), "propagate_error": distorted}
    config = paper_mode(QIGInt8DynamicActivationConfig, {"loss": "mse" if squared else "mae", **others}, bits=4)
    found = torchao_qig.calibrate(model, [inputs], config)
    clean = groups(model, inputs, 4, -1)
    answer, vision = inputs["caption_mask"].float(), inputs["vision_mask"].float()
    counts = (answer.sum(), vision.sum()) if squared else (answer.sum() + vision.sum(),) * 2
    so_far = Calibration()
    assert list(found.groups) == list(clean)
    for number, (label, group) in enumerate(clean.items()):
        bent = copy.deepcopy(model)
        commit(changes(bent, so_far, dict.fromkeys(linear_names(model), QIGWeightOnlyConfig.paper(bits=8, group_size=-1).form)))
        for name in linear_names(model):
            layer, scaled = bent.get_submodule(name), copy.deepcopy(model.get_submodule(name))
            weight, bias = scaled_linear(scaled, *scales_of(so_far, name))
            layer.weight, scaled.weight = (torch.nn.Parameter(weight, requires_grad=False) for _ in range(2))
            layer.bias = scaled.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
            layer.forward = integer_linear(scaled, 4)
        x_q = list(groups(bent, inputs, 4, -1).values())[number].x if distorted else group.x
        inside = {m: integer_linear(m, 4) for m in group.module.modules() if isinstance(m, torch.nn.Linear)}
        if method == "qig":
            w = integer_path_weights(lambda z, g=group: g.replaced({}, z), lambda z, g=group, f=inside: g.replaced(f, z), x_q, group.x)
            assert (torch.stack(found.token_weights(label).weights) - w).abs().max() <= 1e-2 * w.mean()
            w = w / w.sum().clamp(min=1e-8)
        else:
            w = answer / counts[0] + 0.5 * vision / counts[1]
        with torch.no_grad():
            reference = group.replaced({}, x_q if method == "qig" else group.x)
            outputs = [group.replaced({m: integer_linear(m, 4, s) for m in group.layers}, x_q) for s in candidate_scales(x_q)]
        losses = [float((per_token(reference - out, squared) * w).sum()) for out in outputs]
        mine = found.groups[label]
        torch.testing.assert_close(mine.x_mean, x_q.abs().mean((0, 1)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(list(mine.losses.values()), losses, rtol=2e-3, atol=0)
        so_far.groups[label] = mine


def scales_of(found: Calibration, name: str) -> tuple[Tensor | None, Tensor | None]:
    """A linear's scales so far: of its columns, and of its last rows."""
    columns = next((g.scale for g in found.groups.values() if name in g.linears), None)
    return columns, next((g.scale for g in found.groups.values() if g.fold_into == name), None)


def linear_names(model: hf.PreTrainedModel) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]


def test_mbq_ratios() -> None:
    """Measured ratios: gradients of the language-model loss at the outputs of o_proj and down_proj, at least the median."""
    from torchao_qig.methods.token_weights.modality import ModalityGradients
    from torchao_qig.watch.batches import as_batch

    model, inputs = build("qwen2", 2), batch(True)
    labels = torch.randint(0, 50, (B, T)).masked_fill(~inputs["caption_mask"].bool(), -100)
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    blocks = ["model.layers.0", "model.layers.1"]
    ratios = ModalityGradients(model, blocks, {b: names for b in blocks})
    ratios.add(as_batch(model, inputs | {"labels": labels}, False, 0))
    found = ratios.ratios()
    assert all(p.grad is None for p in model.parameters())

    gradients: dict[str, Tensor] = {}
    for b in blocks:
        for n in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"{b}.{n}").register_full_backward_hook(lambda m, i, o, key=f"{b}.{n}": gradients.__setitem__(key, o[0]))
    x = inputs["inputs_embeds"].clone().requires_grad_()
    logits = model(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits
    losses = [torch.nn.functional.cross_entropy(logits[b, :-1], labels[b, 1:], ignore_index=-100) for b in range(B)]
    (sum(losses) / B).backward()
    for part, module in (("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        raw = []
        for b in blocks:
            g = gradients[f"{b}.{module}"].abs().mean(-1)
            means = [(g * m).sum(1) / m.sum(1) for m in (inputs["vision_mask"], inputs["caption_mask"])]
            raw.append(float(means[0].mean() / means[1].mean()))
        for b, value in zip(blocks, raw, strict=True):
            for name in (f"{b}.{module}", f"{b}.{part}"):
                assert found[name] == pytest.approx(max(value, sum(raw) / 2), rel=1e-4)
