"""Dense packing of 1 to 8 bit codes into the words that the kernels read: exactly `bits` bits per weight.

Layout 1 (`LAYOUT`, written into every checkpoint, the same on every device). A weight of N rows and K columns is cut into
tiles of 16 rows by units of 32 columns, both padded at the end. A row of a unit, 32 codes, fills exactly `bits` words of
32 bits. Words are stored as

    qdata[..., word, tile, unit, row in tile]        int32, (..., bits, N / 16, K / 32, 16)

so that the 16 rows of a tile are one vector of lanes (each lane sums its own output: no horizontal reduction), the units
of a tile follow each other in memory, and the words of a unit are `bits` separate streams.

Within a row's `bits` words: a word holds `32 // bits` whole codes from its lowest bit up; codes are dealt to words in
order. What is left over at the top of the words (2 bits each for 3-bit codes, none for 1, 2, 4, 8) forms one string of
bits, word after word, that holds the remaining codes: 30 and 31 for 3 bits. `fields` spells this out for the kernels.

Scale and zero of the groups are stored transposed and padded like the rows: (..., groups, N padded), so that a tile's 16
values are contiguous; groups cover the padded columns too.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUT = 1
TILE = 16  # rows
UNIT = 32  # columns


class BitField(NamedTuple):
    """`width` bits of a code. They begin at bit `at` of the word `word`, and at bit `to` of the code."""

    word: int
    at: int
    width: int
    to: int


@lru_cache
def fields(bits: int) -> tuple[tuple[BitField, ...], ...]:
    """Where each of a unit's 32 codes lies: one part for a code inside a word, more for one stitched from leftovers."""
    per_word = UNIT // bits
    spare = UNIT - per_word * bits  # unused bits at the top of each word
    places: list[tuple[BitField, ...]] = [(BitField(j // per_word, (j % per_word) * bits, bits, 0),) for j in range(per_word * bits)]
    for first in range(0, spare * bits, bits):
        parts: list[BitField] = []
        for bit in range(bits):
            word, offset = divmod(first + bit, spare)
            if parts and parts[-1].word == word:
                parts[-1] = parts[-1]._replace(width=parts[-1].width + 1)
            else:
                parts.append(BitField(word, per_word * bits + offset, 1, bit))
        places.append(tuple(parts))
    return tuple(places)


def padded(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def _pad(t: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, columns - t.shape[-1], 0, rows - t.shape[-2]))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., N, K) in 0 .. 2**bits - 1, any integer dtype, to words (..., bits, N / 16, K / 32, 16) int32."""
    n, k = padded(codes.shape[-2], TILE), padded(codes.shape[-1], UNIT)
    units = _pad(codes, n, k).unflatten(-1, (-1, UNIT)).unflatten(-3, (-1, TILE))  # (..., tile, row, unit, 32)
    words = [torch.zeros(units.shape[:-1], dtype=torch.int64, device=codes.device) for _ in range(bits)]
    for j, parts in enumerate(fields(bits)):
        code = units[..., j].to(torch.int64)
        for part in parts:
            words[part.word] |= ((code >> part.to) & ((1 << part.width) - 1)) << part.at
    stacked = torch.stack(words, dim=-4).transpose(-1, -2)  # (..., bits, tile, unit, row)
    return torch.where(stacked >= 2**31, stacked - 2**32, stacked).to(torch.int32).contiguous()


def unpack_field(words: Tensor, parts: tuple[BitField, ...]) -> Tensor:
    """One column of every unit, (..., tile, unit, row), from words (..., bits, tile, unit, row)."""
    pieces = [((words.select(-4, p.word) >> p.at) & ((1 << p.width) - 1)) << p.to for p in parts]
    code = pieces[0]
    for piece in pieces[1:]:
        code = code | piece
    return code


def unpack(words: Tensor, rows: int, columns: int) -> Tensor:
    """The codes (..., rows, columns) in uint8."""
    columns_of_unit = [unpack_field(words, parts).to(torch.uint8) for parts in fields(int(words.shape[-4]))]
    codes = torch.stack(columns_of_unit, dim=-1)  # (..., tile, unit, row, 32)
    return codes.transpose(-2, -3).flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()


def pack_groups(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Scale or zero (..., N, G) to the stored (..., groups, N padded)."""
    groups = 1 if group_size == -1 else -(-padded(columns, UNIT) // group_size)
    return _pad(values, padded(values.shape[-2], TILE), groups).transpose(-1, -2).contiguous()


def unpack_groups(stored: Tensor, group_size: int, rows: int, columns: int) -> Tensor:
    """The reverse of `pack_groups`: stored scale or zero to (..., rows, G)."""
    groups = 1 if group_size == -1 else columns // group_size
    return stored.transpose(-1, -2)[..., :rows, :groups]
