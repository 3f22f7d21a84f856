"""gptq: a weight's rounding error is made up for by the weights of its row that are not rounded yet.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with what its authors added since: columns in falling order of the Hessian's diagonal
("activation order"), and levels that are fitted before ("static groups"), so that groups stay those of the weight. The
levels are those of `mse`, which no later compensation can make up for.
"""

import torch
from torch import Tensor

from qnb.errors import BadInput
from qnb.rounding import register
from qnb.rounding.base import Statistics
from qnb.rounding.mse import levels_of
from qnb.schemes.grid import Grid, Rounded

# Columns after whose rounding the rest of the weight is made up for at once: a matrix product instead of many updates.
BLOCK = 128
# Shares of the mean of the Hessian's diagonal that are added to it, the next where the one before does not suffice.
DAMPING = (0.01, 0.1, 1.0, 10.0, 100.0)


@register("gptq", needs="hessian")
def gptq(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics) -> Rounded:
    """weight (N, K) -> codes and levels that bring sum((w - q) H (w - q)^T) down, H the Hessian of the statistics.

    Raises BadInput for a Hessian that no damping makes positive definite; where more was needed than usual the result
    says so.
    """
    k = weight.shape[1]
    levels = levels_of(weight, grid, dtype, statistics)
    order = statistics.hessian.diagonal().argsort(descending=True, stable=True)
    upper, note = inverse_factor(statistics.hessian[order][:, order])
    left = weight.T[order].contiguous()  # (K, N), in the order of rounding: what is left to be rounded
    codes = torch.empty_like(left, dtype=grid.nearest(left[0].unsqueeze(1), levels, order[:1], k).dtype)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            column = order[i : i + 1]
            code = grid.nearest(left[i].unsqueeze(1), levels, column, k)
            codes[i] = code.squeeze(1)
            error = (left[i] - grid.values(code, levels, column, k).squeeze(1)) / upper[i, i]
            left[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    back = order.argsort()
    return Rounded(codes[back].T.contiguous(), levels, note=note)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, str | None]:
    """(f32 (K, K) upper triangular U with U^T U = (H + damping)^-1, what to say of the damping).

    An input that was never seen has a diagonal of the damping alone: its errors move nothing.
    """
    exact = hessian.double()
    mean = exact.diagonal().mean()
    for share in DAMPING:
        damping = torch.where(mean > 0, share * mean, 1.0)
        lower, failed = torch.linalg.cholesky_ex(exact + torch.diag(damping.expand(len(exact))))
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            usual = share == DAMPING[0]
            return upper.float(), None if usual else f"Hessian not positive definite: damped by {share:g} of its mean"
    raise BadInput(
        f"the Hessian of its inputs is not positive definite, even damped by {DAMPING[-1]:g} of its mean diagonal: "
        "give other calibration texts, or another rounding"
    )
