"""Plain torch models of the shapes that architectures come in; small, random, float64 where exactness is tested."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, HEADS = 32, 64, 4


class RMSNorm(nn.Module):
    """`offset`: Gemma's, which multiplies by 1 + weight."""

    def __init__(self, width: int = WIDTH, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5 - offset)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    b, t, _ = q.shape
    q, k, v = (x.view(b, t, n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads).transpose(1, 2).reshape(b, t, -1)


class Attention(nn.Module):
    def __init__(self, kv_heads: int = HEADS, fused: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.kv = kv_heads, WIDTH // HEADS * kv_heads
        if fused:
            self.qkv = nn.Linear(WIDTH, WIDTH + 2 * self.kv)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, self.kv), nn.Linear(WIDTH, self.kv)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).split([WIDTH, self.kv, self.kv], -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        return self.o(attend(q, k, v, HEADS, self.kv_heads)), None


class MLP(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        if fused:
            self.gate_up = nn.Linear(WIDTH, 2 * INNER, bias=False)
        else:
            self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if hasattr(self, "gate_up") else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """A mixture of experts that are modules; each gets the tokens that its router sends."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, WIDTH))
        self.experts = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        score, chosen = (flat @ self.router.T).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * score[rows, nth, None])
        return out.view(x.shape)


class Block(nn.Module):
    """Norm, attention, norm, mlp, as most decoders have it."""

    def __init__(self, norm: Callable[[], nn.Module] = RMSNorm, returns_tuple: bool = False, mlp: Callable[[], nn.Module] = MLP, **attention: Any) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(), Attention(**attention), norm(), mlp()
        self.returns_tuple = returns_tuple

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))[0]
        x = x + self.mlp(self.norm2(x))
        return (x, None) if self.returns_tuple else x


class ParallelBlock(nn.Module):
    """Attention and mlp read the same normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y)[0] + self.mlp(y)


class InPlaceBlock(nn.Module):
    """Writes into what its modules have put out, and into its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = self.fc2(self.act(self.fc1(y)))
        out += self.attention(y)[0]
        x += out
        return x


class CrossBlock(nn.Module):
    """Keys and values of other tokens, and a linear that does more than multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.attention, self.odd, self.mlp = nn.Linear(WIDTH, WIDTH), CrossAttention(), OddLinear(WIDTH, WIDTH), MLP()
        self.memory = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.q(x), self.memory.expand(len(x), -1, -1))
        x = x + self.odd(x)[0]
        return x + self.mlp(x)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, q: Tensor, memory: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(q, self.k(memory), self.v(memory)))


class OddLinear(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y.tanh(), y


class GatedBlock(nn.Module):
    """A norm whose output also goes where nothing is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.gate = RMSNorm(), MLP(), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.sigmoid((y * self.gate).sum(-1, keepdim=True)) * self.mlp(y)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head. `glue` is what happens to the hidden state between blocks."""

    def __init__(self, block: Callable[[], nn.Module] = Block, layers: int = 2, glue: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(40, WIDTH), nn.ModuleList(block() for _ in range(layers))
        self.norm, self.head, self.glue = RMSNorm(), nn.Linear(WIDTH, 40, bias=False), glue

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for number, block in enumerate(self.blocks):
            x = x if self.glue is None else self.glue(number, x)
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x))


class OuterResidual(nn.Module):
    """The residual connection lies outside the blocks: they are no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(40, WIDTH), nn.ModuleList(MLP() for _ in range(3)), nn.Linear(WIDTH, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def tokens(batch: int = 4, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))
