"""Where the rows of a linear's input lie among the tokens of the samples.

Most inputs are (B, T, C). Some modules flatten them, windowed attention splits T, and routers of mixtures of experts pass on a
choice of rows: those are found again in the input of the module around them, by equality.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchao_qig.watch.batches import Tokens


@dataclass
class Layout:
    """How an input of `shape` is seen as (B, T, C).

    Attributes:
        grid: (B, T) bool: the tokens of the samples that are in this input and count.
        shape: of the input without channels, as (B, T); for routed rows (1, rows).
        rows: for routed rows, the position of each in the flattened grid.
    """

    grid: Tensor
    shape: tuple[int, int]
    rows: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """`grid` in the shape of the input, without channels: whether each row counts."""
        return self.grid if self.rows is None else self.grid.flatten()[self.rows].unsqueeze(0)

    def view(self, t: Tensor) -> Tensor:
        """(..., channels) -> (B, T, channels)."""
        return t.reshape(*self.shape, -1)

    def to_grid(self, values: Tensor) -> Tensor:
        """Values per row of the input as values per token. Tokens without a row get 0."""
        if self.rows is None:
            return values
        return torch.zeros(self.grid.numel(), dtype=values.dtype, device=values.device).index_copy(0, self.rows, values.flatten()).view(self.grid.shape)

    def from_grid(self, values: Tensor) -> Tensor:
        """One value per token -> one per input row."""
        return values if self.rows is None else values.flatten()[self.rows].unsqueeze(0)


def layout(x: Tensor, tokens: Tokens, around: list[Tensor], everything: bool = False) -> Layout:
    """The layout of an input. `around`: inputs of the modules around it, nearest first; `everything`: padding counts, too."""
    known = tokens.counted
    flat = x.shape[:-1].numel()
    if known is not None and known.numel() == flat and (x.dim() == 2 or tuple(x.shape[:2]) == tuple(known.shape)):
        grid = torch.ones_like(known) if everything else known
        return Layout(grid.to(x.device), (known.shape[0], known.shape[1]))
    if known is not None and x.dim() == 2:
        for source in around:
            if source.shape[-1] == x.shape[-1] and source.shape[:-1].numel() == known.numel() and source is not x:
                rows = find_rows(x, source.reshape(-1, x.shape[-1]))
                if rows is not None:
                    here = torch.zeros(known.numel(), dtype=torch.bool, device=x.device)
                    here[rows] = True
                    counts = here if everything else here & known.to(x.device).flatten()
                    return Layout(counts.view(known.shape), (1, len(x)), rows)
    shape = (1, flat) if x.dim() == 2 else (x.shape[0], flat // x.shape[0])
    return Layout(torch.ones(shape, dtype=torch.bool, device=x.device), shape)


def _hash(rows: Tensor) -> Tensor:
    """An integer per row that is the same for the same bits."""
    bits = rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32).to(torch.int64)
    factors = torch.randint(1, 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)).to(rows.device)
    return (bits * factors).sum(1)


def find_rows(x: Tensor, source: Tensor) -> Tensor | None:
    """The position in `source` of every row of `x`; each row of `source` is taken once. None where a row is not found."""
    keys, order = _hash(source).sort(stable=True)
    wanted = _hash(x)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    if not torch.equal(keys[at], wanted):
        return None
    nth = torch.zeros_like(at)  # equal rows (identical padding) take one position each
    by_key, inverse = at.sort(stable=True)
    same = torch.cat([by_key.new_zeros(1, dtype=torch.bool), by_key[1:] == by_key[:-1]])
    start = torch.where(same, 0, torch.arange(len(by_key), device=x.device)).cummax(0).values
    nth[inverse] = torch.arange(len(by_key), device=x.device) - start
    at = at + nth
    if bool((at >= len(keys)).any()) or not torch.equal(keys[at], wanted):
        return None
    return order[at]
