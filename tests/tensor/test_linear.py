"""The linear: right in eager, right and fused when compiled, with gradients to its input."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from tests.strategies import DTYPES, Case, cases
from torchao_qig import PackedIntTensor
from torchao_qig.tensor.linear import DECODE_ROWS

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest output


def packed(rows: int = 64, columns: int = 256, bits: int = 3, group_size: int = 64, dtype: torch.dtype = torch.float32) -> PackedIntTensor:
    return PackedIntTensor.from_hp(torch.randn(rows, columns), bits, group_size, dtype=dtype)


def close(y: Tensor, exact: Tensor) -> None:
    """Within the dtype's bound of the float64 product."""
    worst = (y.double() - exact).abs().max() / exact.abs().max()
    assert worst <= BOUND[y.dtype], f"error {worst:.1e} of the largest output"


@given(cases(kinds=["normal", "outliers", "one sign"]), st.sampled_from([(), (1,), (3,), (2, 3), (0, 4)]), st.booleans())
def test_eager_linear_is_the_dense_linear(case: Case, lead: tuple[int, ...], with_bias: bool) -> None:
    """Bit for bit F.linear with the dequantized weight: any leading shape, bias or not, every dtype."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric)
    x = torch.randn(*lead, w.shape[1]).to(w.dtype)
    bias = torch.randn(w.shape[0]).to(w.dtype) if with_bias else None
    expected = F.linear(x.reshape(-1, w.shape[1]), p.dequantize(), bias).reshape(*lead, w.shape[0])
    assert torch.equal(F.linear(x, p, bias), expected)


@given(cases(kinds=["normal"], dtypes=[torch.float32]), st.integers(1, 4))
def test_products_with_the_transposed_view(case: Case, m: int) -> None:
    """mm, addmm, @ and matmul; from the left and the untransposed side too."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric)
    dense, x, bias = p.dequantize(), torch.randn(m, w.shape[1]), torch.randn(w.shape[0])
    for result, expected in (
        (torch.mm(x, p.t()), x @ dense.t()),
        (torch.addmm(bias, x, p.t()), torch.addmm(bias, x, dense.t())),
        (x @ p.t(), x @ dense.t()),
        (torch.matmul(x[None], p.t()), x[None] @ dense.t()),
        (torch.mm(p, x.t()), dense @ x.t()),
        (torch.mm(torch.ones(m, w.shape[0]), p), torch.ones(m, w.shape[0]) @ dense),
        (torch.addmm(bias, x, p.t(), alpha=2.0), torch.addmm(bias, x, dense.t(), alpha=2.0)),
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))


def test_bmm_with_experts() -> None:
    """A stack of experts as the second factor."""
    w = PackedIntTensor.from_hp(torch.randn(3, 32, 64), 4, 32)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(torch.bmm(x, w.transpose(1, 2)), torch.bmm(x, w.dequantize().transpose(1, 2)))


def test_pre_scale_multiplies_the_input() -> None:
    """In linear, mm and from the other side, and in their gradients."""
    w = packed()
    w.act_pre_scale = torch.rand(256) + 0.5
    x, effective = torch.randn(5, 256), w.dequantize() * w.act_pre_scale
    torch.testing.assert_close(F.linear(x, w), x @ effective.t())
    torch.testing.assert_close(x @ w.t(), x @ effective.t())
    torch.testing.assert_close(torch.ones(2, 64) @ w, torch.ones(2, 64) @ effective)
    x.requires_grad_()
    F.linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, effective.sum(0).expand(5, 256))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [2, 80])
def test_gradient_flows_to_input_and_bias(compiled: bool, rows: int) -> None:
    """The weight gets none; eager and compiled agree with the dense linear."""
    w, bias = packed(), torch.randn(64, requires_grad=True)
    x = torch.randn(rows, 256, requires_grad=True)
    linear = torch.compile(F.linear, fullgraph=True) if compiled else F.linear
    upstream = torch.randn(rows, 64)
    linear(x, w, bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ w.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, upstream.sum(0), rtol=1e-4, atol=1e-4)


def test_autocast_decides_the_dtype() -> None:
    """As for a dense linear."""
    w = packed()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(2, 256), w).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group_size", "dtype"),
    [
        (1, 32, 64, 32, torch.float32),
        (2, 40, 96, 16, torch.bfloat16),
        (3, 64, 256, 128, torch.bfloat16),
        (3, 33, 144, 48, torch.float16),
        (3, 64, 256, 64, torch.float32),
        (4, 17, 100, -1, torch.bfloat16),
        (5, 64, 128, 64, torch.float16),
        (6, 16, 80, 80, torch.float32),
        (7, 48, 128, 128, torch.bfloat16),
        (8, 64, 256, -1, torch.float32),
        (3, 33, 1056, 16, torch.float32),
        (4, 48, 1024, 128, torch.bfloat16),
    ],
)
def test_compiled_forms_are_right(bits: int, rows: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    """Decode of one row, of several, and prefill, in one graph each: every bits, ragged shapes, groups inside a unit."""
    w, bias = packed(rows, columns, bits, group_size, dtype), torch.randn(rows, dtype=dtype)
    for m in (1, 5, DECODE_ROWS + 6):
        x = torch.randn(m, columns).to(dtype)
        y = torch.compile(F.linear, fullgraph=True, dynamic=False)(x, w, bias)
        assert y.dtype == dtype
        close(y, F.linear(x.double(), w.dequantize(torch.float64), bias.double()))


def kernels_and_buffers(code: str) -> tuple[int, list[int]]:
    """Calls of generated kernels, and the elements of every buffer that the wrapper allocates."""
    body = code[code.index("def call(") :]
    calls = re.findall(r"^\s+(?:cpp_fused\w*|triton_\w+)\(|\.run\(", body, re.MULTILINE)
    sizes = [[int(n) for n in re.findall(r"\d+", shape)] for shape in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", body)]
    return len(calls), [int(torch.tensor(s).prod()) for s in sizes]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("m", [1, 8])
def test_decode_is_one_kernel_that_reads_packed_words(m: int, scaled: bool) -> None:
    """Pre-scale, linear, bias and the activation after it: one generated kernel, no library call, no dense weight."""
    w, bias = packed(128, 1024, dtype=torch.bfloat16), torch.randn(128).bfloat16()
    if scaled:
        w.act_pre_scale = torch.rand(1024).bfloat16() + 0.5

    def layer(x: Tensor) -> Tensor:
        return F.silu(F.linear(x, w, bias))

    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(layer, fullgraph=True, dynamic=False), torch.randn(m, 1024).bfloat16())
    calls, sizes = kernels_and_buffers(codes[0])
    assert len(codes) == 1
    assert calls == 1
    assert "extern_kernels." not in codes[0][codes[0].index("def call(") :]
    assert sizes
    assert max(sizes) < 128 * 1024 / 4


def test_whole_chain_is_one_kernel() -> None:
    """Two linears with an activation between them: still one generated kernel on the CPU."""
    a, b = packed(128, 64), packed(64, 128)
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(lambda x: F.linear(F.relu(F.linear(x, a)), b), fullgraph=True, dynamic=False), torch.randn(1, 64))
    assert kernels_and_buffers(codes[0])[0] == 1


def test_freezing_keeps_the_weight_packed() -> None:
    """Inductor's freezing folds constants; a packed weight folded to floats would undo the whole thing."""
    module = torch.nn.Linear(512, 128).eval()
    module.weight = torch.nn.Parameter(packed(128, 512), requires_grad=False)
    for m in (1, DECODE_ROWS + 1):
        torch._dynamo.reset()
        x = torch.randn(m, 512)
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            y, codes = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), x)
            close(y, module(x).double())
        assert not re.search(r"_frozen_param\d+ = None  # .*torch\.float32 \((?:128, 512|512, 128)\)", codes[0])
        assert "torch.int32" in codes[0]


def test_dynamic_batch_compiles_once_per_form() -> None:
    """No recompilation per batch size: decode and prefill, one graph each."""
    w, counter = packed(columns=1024), CompileCounterWithBackend("inductor")
    linear = torch.compile(lambda x: F.linear(x, w), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for m in (2, 3, 7, 16, DECODE_ROWS, DECODE_ROWS + 1, 100, 333, 5):
            x = torch.randn(m, 1024)
            close(linear(x), F.linear(x.double(), w.dequantize(torch.float64)))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool) -> None:
    """An exported module computes the same; a dynamic batch stays dynamic."""
    module = torch.nn.Linear(256, 64).eval()
    module.weight = torch.nn.Parameter(packed(), requires_grad=False)
    x = torch.randn(4, 256)
    shapes = ({0: torch.export.Dim("batch", min=1, max=512)},) if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    for m in (1, 4, 200) if dynamic else (4,):
        x = torch.randn(m, 256)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_ahead_of_time_compilation(dynamic: bool, tmp_path) -> None:
    """AOTInductor's package runs on the CPU and agrees."""
    module = torch.nn.Linear(256, 64).eval()
    module.weight = torch.nn.Parameter(packed(), requires_grad=False)
    shapes = ({0: torch.export.Dim("batch", min=1, max=512)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(4, 256),), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "linear.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for m in (1, 4, 200) if dynamic else (4,):
            x = torch.randn(m, 256)
            close(compiled(x), F.linear(x.double(), module.weight.dequantize(torch.float64), module.bias.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_keeps_torch_library_rules(dtype: torch.dtype) -> None:
    """Schema, fake implementation and autograd registration, by torch's own check."""
    from torchao_qig.tensor.linear import KERNELS

    w = packed(dtype=dtype)
    x = torch.randn(3, 256, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.torchao_qig.linear.default, (x, w.qdata, w.scale, w.zero_point, None, 64, 64, 256, True, KERNELS))


def test_code_compiled_by_another_version_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's cache on disk knows a weight by the version of the kernels, too."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    from torchao_qig.tensor import linear

    def misses() -> int:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(lambda x: F.linear(x, w), fullgraph=True)(x)
        return int(counters["aot_autograd"]["autograd_cache_miss"])

    w, x = packed(), torch.randn(2, 256)
    with fresh_cache():
        assert [misses(), misses()] == [1, 0]
        monkeypatch.setattr(linear, "KERNELS", linear.KERNELS + 1)
        assert misses() == 1
