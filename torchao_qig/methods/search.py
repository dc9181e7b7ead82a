"""Choose a group's equalization scale s = (mean |x| per channel) ** ratio: the columns of W are multiplied by s, the input is divided by s.

Candidates are the ratios 0, 1/grid, ..., 1 - 1/grid; 0 is plain rounding. The loss of a candidate is the weighted mean over
tokens of the error at the inspected module's output. Ties go to the smaller ratio.

`exhaustive` evaluates every candidate on every sample. `coarse` takes less work. It first evaluates every second candidate on some
of the samples, then the neighbours of the best two until all of these are known, then the best and plain rounding on every sample.
With a stride of 3 it begins with every third candidate and looks at the neighbours of the best one only.
"""

from collections.abc import Callable, Iterable

from torch import Tensor

FLOOR = 1e-4  # smallest entry of a scale, before the scale is centred


def ratios(grid: int) -> list[float]:
    """The candidates' ratios, by their numbers."""
    return [k / grid for k in range(grid)]


def scale_for(x_mean: Tensor, ratio: float) -> Tensor:
    """The candidate scale: float32, geometric mid-range 1, all ones for ratio 0."""
    s = x_mean.pow(ratio).clamp(min=FLOOR)
    return s / (s.max() * s.min()).sqrt()


def token_errors(reference: Tensor, output: Tensor, squared: bool) -> Tensor:
    """(B, T): mean error over channels, in float32."""
    difference = reference.float() - output.float()
    return (difference.square() if squared else difference.abs()).mean(-1)


def gram(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted Gram matrix of (B, T, C) inputs. The squared error of a linear depends on its inputs only through this."""
    flat = x.flatten(0, -2).float()
    return (flat * weights.reshape(-1, 1)).T @ flat


def gram_loss(gram_matrix: Tensor, difference: Tensor) -> Tensor:
    """The weighted squared error: sum over tokens of weight * mean over channels of (x difference^T)^2."""
    d = difference.float()
    return ((d @ gram_matrix) * d).sum() / d.shape[0]


def gram_is_cheaper(tokens: int, outputs: int, inputs: int, candidates: int) -> bool:
    """Whether the losses of all candidates take fewer multiplications with a Gram matrix than with the outputs of every token."""
    return tokens * inputs + candidates * outputs * inputs < candidates * tokens * outputs


Evaluate = Callable[[list[int], bool], list[float]]
Linear = Callable[[Tensor], Tensor]


def _best(losses: dict[int, float]) -> list[int]:
    return sorted(losses, key=lambda k: (losses[k], k))


def exhaustive(evaluate: Evaluate, grid: int, stride: int = 1) -> tuple[int, dict[int, float]]:
    """The best candidate and all losses. `evaluate(candidates, on_part)` gives losses on all samples, or on a part of them."""
    losses = dict(enumerate(evaluate(list(range(grid)), False)))
    return _best(losses)[0], losses


def coarse(evaluate: Evaluate, grid: int, stride: int = 2) -> tuple[int, dict[int, float]]:
    """The best candidate, found with less work, and the losses of the finalists only. A `stride` of 3 saves more where evaluations are expensive."""
    part: dict[int, float] = {}

    def look(candidates: Iterable[int]) -> bool:
        new = sorted({k for k in candidates if 0 <= k < grid and k not in part})
        part.update(zip(new, evaluate(new, True) if new else [], strict=True))
        return bool(new)

    look(range(0, grid, stride))
    while look(k + d for k in _best(part)[: 2 if stride == 2 else 1] for d in (-1, 1)):
        pass
    finalists = sorted({0, _best(part)[0]})
    losses = dict(zip(finalists, evaluate(finalists, False), strict=True))
    return _best(losses)[0], losses


SEARCHES = {"coarse": coarse, "exhaustive": exhaustive}
