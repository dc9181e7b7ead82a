"""torchao's own reusable test classes, run on our tensor.

What of them does not apply here, and why:
- TorchAOBasicTestCase.test_device1_to_device2 calls `.cuda()` whatever the parameters: skipped without an accelerator.
- TorchAOTensorParallelTestCase.test_tp needs CUDA and asserts nothing: its sharding runs below on two gloo ranks, with values.
- _test_slice_and_copy_similar_to_vllm asks for an accelerator by two functions, which are answered with the CPU.
- _test_narrow_similar_to_vllm and _test_quantize_3d_param_similar_to_vllm name "cuda" in their bodies: the same steps stand
  in test_narrow_as_vllm_does and test_experts_as_vllm_does.
- _test_moe_weight_reshape_ops flattens experts into rows (a view that changes the shape), which packed weights refuse.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torchao.quantization import quantize_
from torchao.testing import utils as torchao_suite  # the module: pytest would collect imported classes as upstream's own

from tests.ranks import in_ranks
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig

CONFIG = PackedIntWeightOnlyConfig(bits=4, group_size=64)


class TestBasic(torchao_suite.TorchAOBasicTestCase):
    """Flatten, move, transpose, multiply. 18 dB: what 4 bits leave of Gaussian weights (upstream's 40 is for 8 bits)."""

    TENSOR_SUBCLASS = PackedIntTensor
    FACTORY_FN = staticmethod(PackedIntTensor.from_hp)
    kwargs = {"bits": 4, "group_size": 64}  # noqa: RUF012
    LINEAR_MIN_SQNR = 18

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="upstream's test calls .cuda()")
    def test_device1_to_device2_device1_cpu_device2_cpu(self) -> None:
        super().test_device1_to_device2_device1_cpu_device2_cpu()


class TestCompile(torchao_suite.TorchAOCompileTestCase):
    """The tensor through torch.compile: in, out, made inside, multiplied."""

    TENSOR_SUBCLASS = PackedIntTensor
    FACTORY_FN = staticmethod(PackedIntTensor.from_hp)
    kwargs = {"bits": 4, "group_size": 64}  # noqa: RUF012
    LINEAR_MIN_SQNR = 18
    COMPILE_MIN_SQNR = 50


class TestBasicWithInt8Activations(TestBasic):
    """The same, multiplying integers."""

    kwargs = {"bits": 4, "group_size": 64, "symmetric": True, "int8_activations": True}  # noqa: RUF012


class TestCompileWithInt8Activations(TestCompile):
    """The same, multiplying integers."""

    kwargs = {"bits": 4, "group_size": 64, "symmetric": True, "int8_activations": True}  # noqa: RUF012


class TestIntegration(torchao_suite.TorchAOIntegrationTestCase):
    """What vLLM does with weights while it loads them."""

    def test_chunk_and_cat(self) -> None:
        for weight, dim in ((torch.randn(256, 512), 0), (torch.randn(256, 512), 1), (torch.randn(4, 128, 256), 1), (torch.randn(4, 128, 256), 2)):
            self._test_chunk_similar_to_vllm_llama4(PackedIntTensor.from_hp(weight, 3, 64), dim)

    def test_slice_and_copy(self) -> None:
        with (
            mock.patch.object(torchao_suite, "get_current_accelerator_device", return_value="cpu"),
            mock.patch("torch.accelerator.is_available", return_value=True),
        ):
            self._test_slice_and_copy_similar_to_vllm(CONFIG)


def test_narrow_as_vllm_does() -> None:
    """A narrow of everything keeps every part's number of dimensions."""
    linear = nn.Linear(1024, 1024, dtype=torch.bfloat16)
    quantize_(linear, CONFIG)
    new = linear.weight.narrow(1, 0, 1024)
    for name in new.tensor_data_names:
        assert getattr(new, name).dim() == getattr(linear.weight, name).dim()


def test_experts_as_vllm_does() -> None:
    """Empty experts are quantized in one stack, then filled one by one from the checkpoint."""
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.zeros(6, 96, 128))
    quantize_(linear, CONFIG)
    loaded = PackedIntTensor.from_hp(torch.randn(96, 128), 4, 64)
    linear.weight.data[3].copy_(loaded)
    assert torch.equal(linear.weight[3], loaded)
    assert not linear.weight[2].dequantize().any()


class Layer(nn.Module):
    """The shape that torchao's sharding helpers expect."""

    def __init__(self, columns: int, rows: int, scaled: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
        quantize_(self, CONFIG)
        if scaled:
            self.linear.weight.act_pre_scale = torch.rand(columns, dtype=dtype) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _tensor_parallel(rank: int, scaled: bool, dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(5)
    up, down = Layer(128, 256, scaled, dtype), Layer(256, 128, scaled, dtype)
    x = torch.randn(6, 128, dtype=dtype)
    with torch.no_grad():
        expected = down(up(x))
        mesh = init_device_mesh("cpu", (2,))
        suite = torchao_suite.TorchAOTensorParallelTestCase
        up, down = suite.colwise_shard(up, mesh), suite.rowwise_shard(down, mesh)
        assert up.linear.weight.to_local().shape == (128, 128)
        assert down.linear.weight.to_local().shape == (128, 128)
        if compiled:
            up, down = torch.compile(up), torch.compile(down)
        result = down(up(DTensor.from_local(x, mesh, [Replicate()]))).full_tensor()
    error = (result - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"rank {rank}: {error}"


@pytest.mark.parametrize(("scaled", "dtype", "compiled"), [(False, torch.float32, False), (True, torch.bfloat16, False), (True, torch.float32, True)])
def test_tensor_parallel(scaled: bool, dtype: torch.dtype, compiled: bool, tmp_path: Path) -> None:
    """torchao's column-wise and row-wise sharding on two ranks gives what one rank gives."""
    in_ranks(_tensor_parallel, 2, tmp_path, scaled, dtype, compiled)


def _add_up(rank: int, model: nn.Module, out: Tensor) -> None:
    with torch.no_grad():
        out[rank] = model(torch.ones(1, 128)).sum()


def test_quantized_model_goes_to_other_processes() -> None:
    """mp.spawn shares the weights' memory (on torchao's own tensors that call crashes)."""
    model, out = nn.Linear(128, 32), torch.zeros(2).share_memory_()
    quantize_(model, CONFIG)
    mp.spawn(_add_up, (model, out), nprocs=2)
    torch.testing.assert_close(out, model(torch.ones(1, 128)).sum().detach().expand(2))
