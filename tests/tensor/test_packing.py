"""The words: dense, lossless, and laid out as documented."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import codes
from torchao_qig.tensor import packing


@given(codes())
def test_unpack_undoes_pack(case: tuple[torch.Tensor, int]) -> None:
    """For every bits, shape and batch."""
    q, bits = case
    words = packing.pack(q, bits)
    assert words.dtype == torch.int32
    assert torch.equal(packing.unpack(words, *q.shape[-2:]), q)


@given(codes())
def test_exactly_bits_per_weight(case: tuple[torch.Tensor, int]) -> None:
    """The words of the padded shape hold `bits` bits per weight, no more."""
    q, bits = case
    rows, columns = packing.padded(q.shape[-2], packing.TILE), packing.padded(q.shape[-1], packing.UNIT)
    assert packing.pack(q, bits).numel() * 32 == q[..., 0, 0].numel() * rows * columns * bits


@given(codes(), st.data())
def test_slices_at_tile_and_unit_borders_are_slices_of_the_words(case: tuple[torch.Tensor, int], data: st.DataObject) -> None:
    """What makes views possible."""
    q, bits = case
    row = data.draw(st.integers(0, (q.shape[-2] - 1) // packing.TILE)) * packing.TILE
    column = data.draw(st.integers(0, (q.shape[-1] - 1) // packing.UNIT)) * packing.UNIT
    words = packing.pack(q, bits)[..., row // packing.TILE :, column // packing.UNIT :, :]
    assert torch.equal(packing.unpack(words, q.shape[-2] - row, q.shape[-1] - column), q[..., row:, column:])


@given(st.integers(1, 8))
def test_fields_use_every_bit_once(bits: int) -> None:
    """32 codes cover the unit's words without overlap or hole."""
    used = [(p.word, p.at + i) for parts in packing.fields(bits) for p in parts for i in range(p.width)]
    assert len(packing.fields(bits)) == 32
    assert sorted(used) == [(word, bit) for word in range(bits) for bit in range(32)]


@given(st.integers(1, 8))
def test_fields_order_the_bits_of_a_code(bits: int) -> None:
    """The parts of a stitched code follow each other from its lowest bit up."""
    for parts in packing.fields(bits):
        assert [p.to for p in parts] == [sum(q.width for q in parts[:i]) for i in range(len(parts))]
        assert sum(p.width for p in parts) == bits


def test_layout_1_is_frozen() -> None:
    """Checkpoints depend on it: 3-bit codes 0..31 of row 0, in three words; a change needs a new LAYOUT."""
    q = torch.zeros(1, 32, dtype=torch.uint8)
    q[0] = torch.arange(32) % 8
    words = packing.pack(q, 3)
    assert packing.LAYOUT == 1
    assert words.shape == (3, 1, 1, 16)
    expected = [0, 0, 0]
    for j in range(30):
        expected[j // 10] |= (j % 8) << (3 * (j % 10))
    expected[0] |= (30 % 8 & 3) << 30
    expected[1] |= ((30 % 8) >> 2) << 30 | (31 % 8 & 1) << 31
    expected[2] |= ((31 % 8) >> 1) << 30
    assert [int(w) & 0xFFFFFFFF for w in words[:, 0, 0, 0]] == expected
    assert not words[..., 1:].any()


@given(codes(), st.sampled_from([-1, 16, 32, 48]))
def test_groups_round_trip(case: tuple[torch.Tensor, int], group_size: int) -> None:
    """Scale and zero survive their padded, transposed storage."""
    q, _ = case
    rows, columns = q.shape[-2], packing.padded(q.shape[-1], 48)
    groups = 1 if group_size == -1 else columns // group_size
    values = torch.rand(*q.shape[:-2], rows, groups)
    stored = packing.pack_groups(values, group_size, columns)
    assert stored.is_contiguous()
    assert torch.equal(packing.unpack_groups(stored, group_size, rows, columns), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_works_without_data(bits: int) -> None:
    """Shapes and dtypes on the meta device are those of real tensors."""
    q = torch.zeros(20, 70, dtype=torch.uint8)
    real, meta = packing.pack(q, bits), packing.pack(q.to("meta"), bits)
    assert (real.shape, real.dtype) == (meta.shape, meta.dtype)
