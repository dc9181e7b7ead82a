"""The same tensor on an accelerator."""

import pytest
import torch
import torch.nn.functional as F

from torchao_qig import PackedIntTensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_compiled_linear_agrees_with_the_cpu(bits: int, rows: int) -> None:
    """Moved there, the packed words are the same and so is the product."""
    device = torch.accelerator.current_accelerator()
    w, x = PackedIntTensor.from_hp(torch.randn(256, 512), bits, 128), torch.randn(rows, 512)
    moved = w.to(device)
    assert torch.equal(moved.qdata.cpu(), w.qdata)
    y = torch.compile(F.linear, fullgraph=True, dynamic=False)(x.to(device), moved)
    torch.testing.assert_close(y.cpu(), F.linear(x, w), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("rows", [1, 5, 20, 100])
def test_integer_linear_agrees_with_the_cpu(group_size: int, rows: int) -> None:
    """Eager and compiled there, decode and prefill, are the integers of here."""
    device = torch.accelerator.current_accelerator()
    w = PackedIntTensor.from_hp(torch.randn(256, 512), 4, group_size, symmetric=True, int8_activations=True)
    x, moved = torch.randn(rows, 512), w.to(device)
    expected = F.linear(x, w)
    for linear in (F.linear, torch.compile(F.linear, fullgraph=True, dynamic=False)):
        torch.testing.assert_close(linear(x.to(device), moved).cpu(), expected, rtol=1e-4, atol=1e-3)


def test_pinned_memory() -> None:
    """For transfers that overlap."""
    w = PackedIntTensor.from_hp(torch.randn(64, 128), 3, 128).pin_memory()
    assert w.is_pinned()
