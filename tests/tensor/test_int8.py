"""Integer products: exact in eager and compiled, for every grid; what rounding activations does to odd ones."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.strategies import DTYPES, Case, cases
from torchao_qig import PackedIntTensor
from torchao_qig.tensor import affine
from torchao_qig.tensor.int8 import DECODE_ROWS, in_halves
from torchao_qig.tensor.linear import KERNELS

ODD = [float("nan"), float("inf"), float("-inf")]


def packed(rows: int = 64, columns: int = 256, bits: int = 4, group_size: int = -1, dtype: torch.dtype = torch.float32) -> PackedIntTensor:
    return PackedIntTensor.from_hp(torch.randn(rows, columns), bits, group_size, symmetric=True, dtype=dtype, int8_activations=True)


def integers(bits: int, rows: int, columns: int, group_size: int, symmetric: bool, seed: int, extreme: bool) -> tuple[PackedIntTensor, Tensor]:
    """A weight with scale 1, and the integers that it stands for."""
    g = torch.Generator().manual_seed(seed)
    width = columns if group_size == -1 else group_size
    low, high = (1 if symmetric else 0), 2**bits - 1
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.uint8, generator=g)
    if extreme:
        codes = torch.where(codes > high // 2, high, low).to(torch.uint8)
    zero = torch.randint(0, high + 1, (rows, columns // width), dtype=torch.uint8, generator=g)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    weight = PackedIntTensor.from_codes(codes, torch.ones(zero.shape), zero, bits, group_size, int8_activations=True)
    return weight, codes.long() - zero.long().repeat_interleave(width, 1)


def product(codes: Tensor, w: PackedIntTensor, decode: bool = False, halves: bool = False) -> Tensor:
    """The operator on given codes with scales of 1: nothing but the integers, in float64, which holds them all."""
    ones = torch.ones(len(codes), 1, dtype=torch.float64)
    x = torch.empty(codes.shape, dtype=torch.float64)
    return torch.ops.torchao_qig.int8_linear(x, codes, ones, w.qdata, w.scale, w.zero_point, None, w.group_size, w.rows, w.columns, decode, halves, KERNELS)


@given(
    st.integers(2, 8), st.sampled_from([1, 16, 33]), st.sampled_from([(16, -1), (16, 16), (48, 16), (100, -1), (256, 64), (240, 80)]),
    st.integers(0, 20), st.booleans(), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_result_is_the_exact_integer_product(bits: int, rows: int, shape: tuple[int, int], m: int, symmetric: bool, seed: int, extreme: bool) -> None:
    """Against 64-bit integers, for every bits, zero point, group and number of rows."""
    columns, group_size = shape
    w, exact = integers(bits, rows, columns, group_size, symmetric or bits == 8, seed, extreme)
    codes = torch.randint(-127, 128, (m, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed + 1))
    codes = torch.where(codes > 0, 127, -127).to(torch.int8) if extreme else codes
    assert torch.equal(product(codes, w).long(), codes.long() @ exact.T)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_halves_make_a_whole(bits: int, group_size: int) -> None:
    """Wide codes in two products, eager and compiled."""
    w, exact = integers(bits, 33, 256, group_size, bits == 8, 0, False)
    codes = torch.randint(-127, 128, (DECODE_ROWS + 4, 256), dtype=torch.int8)
    for linear in (product, torch.compile(product, fullgraph=True, dynamic=False)):
        assert torch.equal(linear(codes, w, False, True).long(), codes.long() @ exact.T)


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_a_processor_that_clips_gets_halves(isa: str) -> None:
    """oneDNN without VNNI instructions clips on most processors: in a process of its own, since it looks at them once."""
    code = "from tests.tensor.test_int8 import largest; largest()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def largest() -> None:
    """The largest products of 8 bits and of 7 asymmetric ones are exact through the linear itself."""
    x = torch.ones(8, 256)
    for bits, symmetric in ((8, True), (7, False)):
        w = PackedIntTensor.from_hp(torch.full((16, 256), 2.0), bits, -1, symmetric, int8_activations=True)
        torch.testing.assert_close(F.linear(x, w), torch.full((8, 16), 512.0), rtol=1e-5, atol=0)
    whole = torch._int_mm(torch.full((32, 256), 127, dtype=torch.int8), torch.full((256, 16), 127, dtype=torch.int8))
    assert in_halves(8, x.device) == bool((whole != 127 * 127 * 256).any())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("compiled", ["decode", "prefill", None])
def test_no_overflow_up_to_131072_columns(bits: int, compiled: str | None) -> None:
    """The largest weights against the largest activations: both ends of int32 within a percent."""
    columns, top = 2**17, 2 ** (bits - 1) - 1
    codes = torch.full((16, columns), 2**bits - 1, dtype=torch.uint8)
    codes[1] = 1
    w = PackedIntTensor.from_codes(codes, torch.ones(16, 1), torch.full((16, 1), 2 ** (bits - 1)), bits, -1, int8_activations=True)
    m = {"decode": 1, "prefill": DECODE_ROWS + 1, None: 1}[compiled]
    linear = torch.compile(product, fullgraph=True, dynamic=False) if compiled else product
    found = linear(torch.full((m, columns), 127, dtype=torch.int8), w, compiled == "decode")
    assert found[:, :3].long().tolist() == [[127 * top * columns, -127 * top * columns, 127 * top * columns]] * m


@given(cases(kinds=["normal", "outliers", "one sign"]), st.sampled_from([(), (1,), (3,), (2, 3), (0, 4)]), st.booleans())
def test_linear_is_that_of_the_rounded_activations(case: Case, lead: tuple[int, ...], with_bias: bool) -> None:
    """F.linear of what activations and weight come back as, to the dtype's rounding."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric or bits == 8, int8_activations=True)
    x = torch.randn(*lead, w.shape[1]).to(w.dtype)
    bias = torch.randn(w.shape[0]).to(w.dtype) if with_bias else None
    expected = F.linear(affine.fake_quantize_rows(x.float()).double(), p.dequantize(torch.float64), None if bias is None else bias.double())
    y = F.linear(x, p, bias)
    assert y.dtype == x.dtype
    bound = 2 * torch.finfo(x.dtype).eps * (expected.abs().amax() if expected.numel() else 0) + 1e-5 * float(w.abs().max())
    assert not y.numel() or (y.double() - expected).abs().max() <= bound


@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from([1e-30, 1e-6, 1.0, 1e4]), st.integers(1, 70))
def test_rows_come_back_within_half_a_step(seed: int, dtype: torch.dtype, size: float, columns: int) -> None:
    """The largest value exactly, the others to half a step; every token on its own."""
    x = (torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    codes, scale = affine.quantize_rows(x)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -127
    error = (codes.double() * scale.double() - x.double()).abs()
    assert bool((error <= scale.double() * 0.5001).all())
    assert torch.equal(affine.quantize_rows(x[1:2])[0], codes[1:2])
    assert bool((codes.abs().amax(1)[x.abs().amax(1) > 127 * torch.finfo(torch.float32).tiny] == 127).all())


@given(cases(kinds=["normal", "outliers"]), st.integers(1, 6), st.data())
def test_zeros_and_odd_values_stay_with_their_tokens(case: Case, m: int, data: st.DataObject) -> None:
    """A token of zeros has a positive scale and gives the bias; one NaN or infinity anywhere makes all of its token NaN; others do not notice."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric or bits == 8, int8_activations=True)
    x, bias = torch.randn(m, w.shape[1]).to(w.dtype), torch.randn(w.shape[0]).to(w.dtype)
    plain = F.linear(x, p, bias)
    kinds = data.draw(st.lists(st.sampled_from(["plain", "zero", "odd"]), min_size=m, max_size=m))
    for row, kind in enumerate(kinds):
        if kind == "zero":
            x[row] = 0
        elif kind == "odd":
            x[row, data.draw(st.integers(0, w.shape[1] - 1))] = data.draw(st.sampled_from(ODD))
    y, (codes, scale) = F.linear(x, p, bias), affine.quantize_rows(x)
    for row, kind in enumerate(kinds):
        if kind == "plain":
            assert torch.equal(y[row], plain[row])
        elif kind == "zero":
            assert float(scale[row]) > 0
            assert not codes[row].any()
            assert torch.equal(y[row], bias)
        else:
            assert bool(y[row].isnan().all())


def test_units_of_the_official_layer() -> None:
    """Weights, activations and outputs of its weight-activation linear, a token of zeros among them."""
    u = load_file("tests/golden/units.safetensors")
    for bits in (4, 8):
        name = f"wal.w{bits}a8"
        w = PackedIntTensor.from_hp(u["wal.weight"], bits, -1, symmetric=True, paper_rules=True, int8_activations=True)
        torch.testing.assert_close(w.dequantize(), u[f"{name}.qweight"], rtol=2e-7, atol=0)
        torch.testing.assert_close(affine.fake_quantize_rows(u["wal.x"], paper_rules=True), u[f"{name}.qx"], rtol=2e-7, atol=0)
        torch.testing.assert_close(F.linear(u["wal.x"], w, u["wal.bias"]), u[f"{name}.y"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("m", [3, DECODE_ROWS + 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_token_of_zeros_gives_the_bias(m: int, compiled: bool) -> None:
    """And leaves its neighbours alone."""
    w, bias, x = packed(), torch.randn(64), torch.randn(m, 256)
    alone = F.linear(x, w, bias)
    x[1] = 0
    linear = torch.compile(F.linear, fullgraph=True, dynamic=False) if compiled else F.linear
    y = linear(x, w, bias)
    assert torch.equal(y[1], bias)
    assert torch.equal(y[0], alone[0])
    assert torch.equal(y[2], alone[2])


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("m", [3, DECODE_ROWS + 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_nan_and_infinity_do_not_vanish(odd: float, m: int, compiled: bool, group_size: int) -> None:
    """Every output of such a token is NaN; other tokens do not notice."""
    w, x = packed(group_size=group_size), torch.randn(m, 256)
    linear = torch.compile(F.linear, fullgraph=True, dynamic=False) if compiled else F.linear
    alone = linear(x, w)
    x[1, 7] = odd
    y = linear(x, w)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[0], alone[0])
    assert torch.equal(y[2:], alone[2:])


@given(cases(kinds=["normal"], dtypes=[torch.float32]))
def test_flag_survives_views_copies_and_files(case: Case) -> None:
    """Slices, joins, transposition, moves, deep copies, pickles: the same linear on the other side."""
    w, (bits, group, _) = case
    p = PackedIntTensor.from_hp(w, max(bits, 2), group, symmetric=True, int8_activations=True)
    x = torch.randn(3, w.shape[1])
    whole = F.linear(x, p)
    assert torch.equal(whole, F.linear(affine.fake_quantize_rows(x), p))
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    for same in (p.t().t(), p.clone(), copy.deepcopy(p), p.to("cpu", copy=True), torch.load(buffer, weights_only=True), p.detach()):
        assert same.int8_activations
        assert torch.equal(F.linear(x, same), whole)
    if len(w) > 16:
        top, rest = p[:16], p[16:]
        assert torch.equal(torch.cat([F.linear(x, top), F.linear(x, rest)], 1), whole)
        assert torch.equal(F.linear(x, torch.cat([top, rest])), whole)
        with pytest.raises(ValueError, match="int8_activations"):
            torch.cat([top, PackedIntTensor.from_hp(w, max(bits, 2), group, symmetric=True)[16:]])


def test_eight_bits_must_be_symmetric() -> None:
    """code - zero would not fit eight bits."""
    with pytest.raises(ValueError, match="symmetric=True"):
        PackedIntTensor.from_hp(torch.randn(16, 64) + 1, 8, -1, symmetric=False, int8_activations=True)
