"""Every format keeps the protocol's promises: values, dense form and packed tensor are the same numbers, and nothing is nearer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

from tests.strategies import Case, cases
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.formats import Affine, Float, Foreign, Int8PerToken, LinearForm
from torchao_qig.tensor import affine


def wide(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


@given(cases(), st.booleans())
def test_values_dense_and_packed_agree(case: Case, official: bool) -> None:
    """Bit for bit, in any order of columns, and as rounding to nearest has them."""
    w, fmt = wide(case.weight), Affine(*case.grid, official)
    params = fmt.fit(w, case.weight.dtype)
    spread = fmt.spread(params, w.shape[1], w.dtype)
    codes, values = fmt.nearest(w, spread)
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = fmt.nearest(w[:, order], tuple(p[:, order] for p in spread))
    assert torch.equal(shuffled[0], codes[:, order])
    assert torch.equal(values, fmt.dense(codes, params, w.dtype))
    packed = fmt.pack(codes, params)
    assert torch.equal(values, packed.dequantize(w.dtype))
    assert torch.equal(values, fmt.rounded(w, case.weight.dtype))
    assert torch.equal(packed.qdata, fmt.stored(case.weight, case.weight.dtype).qdata) or official  # official floors depend on the weight's own dtype


@given(cases(dtypes=[torch.float32], kinds=["normal", "outliers", "one sign", "ties"]))
def test_nothing_stored_is_nearer(case: Case) -> None:
    """Against every code that there is."""
    w, fmt = case.weight, Affine(*case.grid)
    params = fmt.fit(w, w.dtype)
    spread = fmt.spread(params, w.shape[1], w.dtype)
    error = (fmt.nearest(w, spread)[1] - w).abs()
    for code in range(2**fmt.bits):
        other = (fmt.dense(torch.full_like(w, code), params, w.dtype) - w).abs()
        assert (error <= other * (1 + 1e-5) + 1e-4 * spread[0]).all()  # division and product round, too


@given(cases(dtypes=[torch.float32]))
def test_size_is_that_of_the_data(case: Case) -> None:
    """Where rows and columns fill the packed tensor's tiles there is no padding, and every byte is counted."""
    w, fmt = case.weight, Affine(*case.grid)
    packed = fmt.stored(w, w.dtype)
    counted, held = fmt.nbytes(*w.shape, w.dtype), packed.nbytes_packed()
    assert counted <= held
    if w.shape[0] % 16 == 0 and w.shape[1] % 32 == 0 and (case.grid.group_size == -1 or case.grid.group_size % 32 == 0):
        assert counted == held
    assert fmt.misfit(*w.shape) is None
    assert Affine(3, 16).misfit(4, 24) is not None


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), IntxWeightOnlyConfig(weight_dtype=torch.int4), PackedIntWeightOnlyConfig(bits=3, group_size=64)])
def test_configs_of_torchao(config: object) -> None:
    """Their own rounding; a scale over columns is taken out again; their bytes are those of their tensors."""
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    fmt, scale = Foreign(config), torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5  # type: ignore[arg-type]
    stored = fmt.stored(w, torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(fmt.rounded(w, torch.bfloat16), stored.dequantize().float())
    torch.testing.assert_close(fmt.rounded(w, torch.float32, scale), fmt.rounded(w * scale, torch.float32) / scale)
    assert 0.3 * w.numel() < fmt.nbytes(96, 128, torch.float32) < 1.2 * w.numel()
    if isinstance(stored, PackedIntTensor):
        assert fmt.nbytes(96, 128, torch.bfloat16) == stored.nbytes_packed() == Affine(3, 64).nbytes(96, 128, torch.bfloat16)


def test_activations() -> None:
    """Rounded or not, with a scale that is taken out again; packed weights know it, and integers that cannot be multiplied are refused."""
    x, scale = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.full((64,), 2.0)
    assert Float().fake(x, scale) is x
    assert torch.equal(Int8PerToken().fake(x), affine.fake_quantize_rows(x))
    torch.testing.assert_close(Int8PerToken().fake(x, scale), Int8PerToken().fake(x / 2) * 2)
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    form = LinearForm(Affine(4, -1, symmetric=True), Int8PerToken())
    stored = form.stored(w, torch.float32)
    assert isinstance(stored, PackedIntTensor)
    assert stored.int8_activations
    product = form.product(torch.float32)(w, None)
    torch.testing.assert_close(product(x), torch.nn.functional.linear(x, stored))
    with pytest.raises(ValueError, match="must be symmetric"):
        LinearForm(Affine(8, -1), Int8PerToken()).stored(w, torch.float32)


def test_configs_say_what_linears_become() -> None:
    """The description is what calibrations and checkpoints have always held."""
    assert QIGWeightOnlyConfig(bits=2, group_size=64).form.describe() == [2, 64, False]
    assert QIGInt8DynamicActivationConfig().form.describe() == [4, -1, True, "int8 activations"]
    assert QIGWeightOnlyConfig(format=Int8WeightOnlyConfig()).form.describe() == [repr(Int8WeightOnlyConfig())]
    assert QIGWeightOnlyConfig(bits=3).form == LinearForm(Affine(3, 128), Float(), None)
