"""The tensor: what torch may do with it, and that it never shows a wrong weight."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import DTYPES, Case, cases
from torchao_qig import PackedIntTensor
from torchao_qig.tensor import affine


def packed(rows: int = 64, columns: int = 256, bits: int = 3, group_size: int = 64, batch: tuple[int, ...] = (), **kwargs) -> PackedIntTensor:
    return PackedIntTensor.from_hp(torch.randn(*batch, rows, columns), bits, group_size, **kwargs)


def with_pre_scale(w: PackedIntTensor) -> PackedIntTensor:
    w.act_pre_scale = torch.rand(w.columns) + 0.5
    return w


def same(a: Tensor, b: Tensor) -> bool:
    return isinstance(a, PackedIntTensor) and isinstance(b, PackedIntTensor) and torch.equal(a, b)


@given(cases())
def test_dequantized_is_the_fake_quantized_weight(case: Case) -> None:
    """Packing adds nothing and loses nothing, bit for bit, padding invisible."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric)
    assert (p.shape, p.dtype, p.device) == (w.shape, w.dtype, w.device)
    assert torch.equal(p.dequantize(), affine.fake_quantize(w, bits, group, symmetric))


@given(cases(kinds=["normal"]), st.data())
def test_slicing_commutes_with_dequantizing(case: Case, data: st.DataObject) -> None:
    """Along both dimensions at borders; and a border is the only place where a slice is given."""
    w, (bits, group, symmetric) = case
    p = PackedIntTensor.from_hp(w, bits, group, symmetric)
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, w.shape[dim] - 1))
    end = data.draw(st.integers(start + 1, w.shape[dim]))
    border = 16 if dim == 0 else (32 if group == -1 else torch.lcm(torch.tensor(32), torch.tensor(group)).item())
    if (start, end) == (0, w.shape[dim]) or (start % border == 0 and (end % border == 0 or end == w.shape[dim])):
        part = p.narrow(dim, start, end - start)
        assert torch.equal(part.dequantize(), p.dequantize().narrow(dim, start, end - start))
        assert part.qdata.untyped_storage().data_ptr() == p.qdata.untyped_storage().data_ptr()
    else:
        with pytest.raises(ValueError, match="multiples of"):
            p.narrow(dim, start, end - start)


@pytest.mark.parametrize(
    "op",
    [
        lambda w: w[16:48], lambda w: w[:, 64:192], lambda w: w.narrow(0, 32, 32), lambda w: w.chunk(2, 0)[1], lambda w: w.chunk(2, -1)[0],
        lambda w: w.split(32)[1], lambda w: w.split([16, 48])[1], lambda w: w.split(64, 1)[3], lambda w: w.t(), lambda w: w.t()[64:128],
        lambda w: w.transpose(0, 1)[:, 16:32], lambda w: w.mT, lambda w: w.detach(), lambda w: w.clone(), lambda w: w.contiguous(),
        lambda w: w.view(64, 256), lambda w: w.reshape(-1, 256), lambda w: torch.cat([w, w]), lambda w: torch.cat([w, w], 1),
        lambda w: torch.cat([w[:32], w[32:]]), lambda w: torch.cat([w[:, :64], w[:, 64:]], -1), lambda w: torch.cat([w.t(), w.t()], 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_views_and_joins(op: Callable[[Tensor], Tensor], inference: bool, scaled: bool) -> None:
    """What an op makes of the packed tensor is what it makes of the dense one; in inference mode too."""
    w = with_pre_scale(packed()) if scaled else packed()
    with torch.inference_mode(inference):
        result, expected = op(w), op(w.dequantize())
        assert isinstance(result, PackedIntTensor)
        assert result.shape == expected.shape
        assert torch.equal(result.dequantize(), expected)
        if scaled and result.columns != w.columns:
            assert result.act_pre_scale.shape == (result.columns,)


@pytest.mark.parametrize(
    "op",
    [lambda w: w[0], lambda w: w[3], lambda w: w[-1], lambda w: w[0:2], lambda w: w[:, 16:48], lambda w: w[:, :, 64:128], lambda w: w.transpose(1, 2),
     lambda w: w.transpose(1, 2)[1], lambda w: w.unbind()[2], lambda w: w.chunk(2)[1], lambda w: torch.cat([w, w]), lambda w: torch.cat([w, w], 1),
     lambda w: torch.stack(list(w.unbind()))],
)  # fmt: skip
def test_stacks_of_experts(op: Callable[[Tensor], Tensor]) -> None:
    """3-D weights: selecting, slicing and joining experts."""
    w = packed(batch=(4,))
    assert torch.equal(op(w).dequantize(), op(w.dequantize()))


def test_select_shares_memory_with_the_stack() -> None:
    """An expert is a view."""
    w = packed(batch=(4,))
    assert w[2].qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (lambda w: w[3:20], "multiples of 16"), (lambda w: w[:, 32:], "multiples of 64"), (lambda w: w[::2], "steps of 1"), (lambda w: w[5:5], "to nothing"),
        (lambda w: w[7], "select"), (lambda w: w.view(128, 128), "cannot change its shape"), (lambda w: w.to(torch.int8), "floating-point"),
        (lambda w: torch.cat([w, torch.randn(64, 256)]), "packed weights can only"), (lambda w: torch.cat([w, packed(bits=4)]), "bits differs"),
        (lambda w: torch.cat([w[:, :64], packed(group_size=-1)]), "group_size differs"), (lambda w: torch.cat([packed(rows=40), w]), "multiples of 16"),
        (lambda w: torch.cat([w, with_pre_scale(packed())]), "act_pre_scale"), (lambda w: w.copy_(torch.randn(64, 256)), "float tensor"),
        (lambda w: torch.randn(64, 256).copy_(w), "into a float tensor"),
        (lambda w: w.copy_(packed(bits=4)), "bits differs"), (lambda w: w.copy_(with_pre_scale(packed())), "act_pre_scale"),
        (lambda w: torch.nn.functional.linear(torch.randn(2, 100), w), "256 columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_says_why(op: Callable[[Tensor], object], words: str) -> None:
    """A clear error, and the tensor is as before."""
    w = packed()
    before = w.dequantize()
    with pytest.raises(ValueError, match=words):
        op(w)
    assert torch.equal(w.dequantize(), before)


@pytest.mark.parametrize(
    ("weight", "words"),
    [(torch.tensor([[float("nan")] * 128]), "NaN"), (torch.tensor([[float("inf")] * 128]), "infinity"), (torch.ones(4, 128, dtype=torch.int32), "int32"),
     (torch.randn(128), "matrix"), (torch.randn(0, 128), "non-empty"), (torch.randn(4, 100), "group_size=128")],
)  # fmt: skip
def test_weights_that_cannot_be_packed(weight: Tensor, words: str) -> None:
    """NaN, infinity, integers, vectors, nothing, rows that do not divide."""
    with pytest.raises(ValueError, match=words):
        PackedIntTensor.from_hp(weight, 3, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype_and_back(dtype: torch.dtype) -> None:
    """The scale changes its dtype, the codes stay; the copy shares no memory."""
    w = with_pre_scale(packed())
    moved = w.to(dtype)
    assert (moved.dtype, moved.scale.dtype, moved.act_pre_scale.dtype) == (dtype, dtype, dtype)
    assert torch.equal(moved.qdata, w.qdata)
    torch.testing.assert_close(moved.dequantize(torch.float32), w.dequantize(), rtol=2**-7, atol=1e-6)
    assert w.to(w.dtype) is w


def test_moves_between_devices() -> None:
    """meta and back with the right shapes; empty_like like torch's."""
    w = packed()
    assert w.to("meta").qdata.is_meta
    assert w.to("meta").shape == w.shape
    empty = torch.empty_like(w.to("meta"), device="cpu")
    assert empty.copy_(w) is empty
    assert same(empty, w)
    assert torch.empty_like(w, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_moved_slice_does_not_keep_the_whole() -> None:
    """`.to(copy)` and clone of a view hold only the view's bytes."""
    part = packed(rows=256)[16:32].to(torch.bfloat16)
    assert part.qdata.untyped_storage().nbytes() == part.qdata.numel() * 4


def through_torch_save(w: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(w, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("trip", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w)), through_torch_save])
@pytest.mark.parametrize(
    "make",
    [
        packed,
        lambda: with_pre_scale(packed()),
        lambda: packed(batch=(2,)),
        lambda: packed().t(),
        lambda: packed()[16:32],
        lambda: packed(rows=5, columns=48, group_size=16),
    ],
)
def test_copies_through_files(trip: Callable[[Tensor], Tensor], make: Callable[[], PackedIntTensor]) -> None:
    """deepcopy, pickle, torch.save with weights_only: all of it comes back."""
    w = make()
    assert same(trip(w), w)
    parameter = torch.nn.Parameter(w, requires_grad=False)
    back = trip(parameter)
    assert isinstance(back, torch.nn.Parameter)
    assert same(back, w)


def test_damaged_file_is_refused() -> None:
    """One flipped bit in a pickle's data is an error, not a wrong weight."""
    w = packed()
    raw = bytearray(pickle.dumps(w))
    at = bytes(raw).index(w.qdata.numpy().tobytes()[:64])
    raw[at + 9] ^= 16
    with pytest.raises(ValueError, match="damaged"):
        pickle.loads(bytes(raw))


@pytest.mark.parametrize("change", [{"bits": 4}, {"rows": 63 + 17}, {"columns": 128}, {"group_size": 32}, {"layout_version": 2}, {"checksum": 1}])
def test_data_that_contradicts_its_description_is_refused(change: dict[str, int]) -> None:
    """Whoever builds the tensor, a loader included, gets an error that names what is wrong."""
    w = packed()
    described = {"bits": 3, "group_size": 64, "rows": 64, "columns": 256, **change}
    with pytest.raises(ValueError, match=r"bits|rows|scale|layout_version|damaged"):
        PackedIntTensor(w.qdata, w.scale, w.zero_point, **described)


def test_sharing_memory_between_processes() -> None:
    """share_memory_ crashes the process on torchao's own tensors."""
    w = packed()
    assert not w.is_shared()
    assert w.share_memory_() is w
    assert w.is_shared()
    assert w.qdata.is_shared()
    assert not w.is_pinned()


def test_repr_says_bits_group_and_size() -> None:
    """What a user looks for when printing a weight."""
    text = repr(packed(rows=64, columns=256).to(torch.bfloat16))
    assert "3 bits, group 64" in text
    assert "shape=(64, 256)" in text
    assert "7,680 bytes" not in text
    assert f"{64 * 256 * 3 // 8 + 64 * 4 * 3:,} bytes = 3.38 bits per weight" in text
    assert "per row" in repr(packed(group_size=-1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_bits_plus_24_over_the_group(bits: int) -> None:
    """16-bit scale, 8-bit zero: below the promised bits + 32 / g."""
    w = packed(rows=128, columns=512, bits=bits, group_size=128).to(torch.bfloat16)
    assert w.nbytes_packed() * 8 == 128 * 512 * (bits + 24 / 128)


def test_module_to_and_state_dict() -> None:
    """nn.Module's own ways of moving and loading."""
    source, target = torch.nn.Linear(256, 64), torch.nn.Linear(256, 64)
    for module in (source, target):
        module.weight = torch.nn.Parameter(packed(), requires_grad=False)
    target.load_state_dict(source.state_dict())
    assert same(target.weight, source.weight)
    float_target = torch.nn.Linear(256, 64)
    float_target.load_state_dict(source.state_dict(), assign=True)
    assert same(float_target.weight, source.weight)
    assert target.to(torch.bfloat16).weight.scale.dtype == torch.bfloat16
    assert target.to_empty(device="meta").weight.qdata.is_meta
