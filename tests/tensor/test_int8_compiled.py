"""Linears with int8 activations when they are compiled, exported and differentiated."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from tests.strategies import DTYPES
from tests.tensor.test_int8 import packed
from torchao_qig.tensor import affine
from torchao_qig.tensor.int8 import DECODE_ROWS
from torchao_qig.tensor.linear import KERNELS


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group_size", "dtype"),
    [
        (2, 40, 96, -1, torch.bfloat16), (3, 33, 144, -1, torch.float16), (4, 17, 100, -1, torch.bfloat16), (4, 64, 256, -1, torch.float32),
        (5, 64, 128, -1, torch.float32), (8, 64, 1280, -1, torch.float32), (4, 64, 256, 128, torch.bfloat16), (3, 33, 144, 48, torch.float32),
        (8, 32, 1056, 16, torch.float32),
    ],
)  # fmt: skip
def test_compiled_forms_are_those_of_eager(bits: int, rows: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    """One row, several, many: bit for bit with one scale per row; groups are added up in another order."""
    w, bias = packed(rows, columns, bits, group_size, dtype), torch.randn(rows, dtype=dtype)
    if dtype == torch.float32:  # the compiler does not round in between to narrower ones
        w.act_pre_scale = torch.rand(columns) + 0.5
    for m in (1, 5, DECODE_ROWS + 6):
        x = torch.randn(m, columns).to(dtype)
        y, expected = torch.compile(F.linear, fullgraph=True, dynamic=False)(x, w, bias), F.linear(x, w, bias)
        assert y.dtype == dtype
        if group_size == -1:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * float(expected.abs().max()))


def test_decode_and_prefill_multiply_integers() -> None:
    """Decode: one kernel, no library call, sums in int32. Prefill: the integer matmul, and no float weight."""
    w = packed(128, 1024, dtype=torch.bfloat16)
    generated = []
    for m in (1, 64):
        torch._dynamo.reset()
        with torch.no_grad():
            _, codes = run_and_get_code(torch.compile(lambda x: F.silu(F.linear(x, w)), fullgraph=True, dynamic=False), torch.randn(m, 1024).bfloat16())
        generated.append(codes[0])
    decode, prefill = generated
    body = decode[decode.index("def call(") :]
    assert "extern_kernels." not in body
    assert len(re.findall(r"^\s+cpp_fused\w*\(", body, re.MULTILINE)) == 1
    assert "Vectorized<int32_t> tmp_acc" in decode
    body = prefill[prefill.index("def call(") :]
    assert len(re.findall(r"_int_mm", body)) == 1
    buffers = re.findall(r"empty_strided_cpu\(\(([^)]*)\), \([^)]*\), (torch\.\w+)\)", body)
    assert [kind for shape, kind in buffers if math.prod(int(n) for n in re.findall(r"\d+", shape)) >= 128 * 1024] == ["torch.int8"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_go_straight_through(compiled: bool, rows: int) -> None:
    """As if nothing had been rounded: those of the dense linear; also to the bias."""
    w, bias = packed(), torch.randn(64, requires_grad=True)
    w.act_pre_scale = torch.rand(256) + 0.5
    x, upstream = torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 64)
    linear = torch.compile(F.linear, fullgraph=True) if compiled else F.linear
    linear(x, w, bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ w.dequantize() * w.act_pre_scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, upstream.sum(0), rtol=1e-4, atol=1e-4)


def test_dynamic_batch_and_export() -> None:
    """One exported program for every batch; a compiled one with dynamic sizes agrees in both forms."""
    module = torch.nn.Linear(256, 64).eval()
    module.weight = torch.nn.Parameter(packed(), requires_grad=False)
    program = torch.export.export(module, (torch.randn(4, 256),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=512)},))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (2, 4, DECODE_ROWS, DECODE_ROWS + 1, 200):
            x = torch.randn(m, 256)
            assert torch.equal(program.module()(x), module(x))
            assert torch.equal(compiled(x), module(x))


def test_ahead_of_time_compilation(tmp_path) -> None:
    """AOTInductor's package agrees."""
    module = torch.nn.Linear(256, 64).eval()
    module.weight = torch.nn.Parameter(packed(), requires_grad=False)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(40, 256),))
        compiled = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "linear.pt2")))
        x = torch.randn(40, 256)
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_keeps_torch_library_rules(dtype: torch.dtype) -> None:
    """Schema, fake implementation and autograd registration, by torch's own check."""
    w = packed(dtype=dtype)
    x = torch.randn(3, 256, dtype=dtype, requires_grad=True)
    codes, scale = affine.quantize_rows(x.detach())
    arguments = (x, codes, scale, w.qdata, w.scale, w.zero_point, None, -1, 64, 256, True, False, KERNELS)
    torch.library.opcheck(torch.ops.torchao_qig.int8_linear.default, arguments)
