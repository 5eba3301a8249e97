"""The error budget of the ops."""

from __future__ import annotations

import torch


def assert_close_to_fp64(
    actual: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, *, max_lse: float = 0.0, times: float = 2.0
) -> tuple[float, float]:
    """`actual` may be at most twice (`times`) as far from the fp64 `oracle` as `plain` torch code in the same dtype.

    Held for the root mean square and for the maximum of the errors, plus eps(fp32) · `max_lse`: the rounding of a
    log-sum-exp of that size, which no formulation escapes. Use at least 64 rows, so that the maximum means something.

    Returns:
        error and budget, of whichever of the two measures comes nearer to its budget.
    """
    if oracle.dtype is not torch.float64:
        raise TypeError(f"assert_close_to_fp64: oracle must be torch.float64, got {oracle.dtype}")
    if not actual.shape == plain.shape == oracle.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, {tuple(plain.shape)}, {tuple(oracle.shape)}")
    error, allowed = ((x.detach().double() - oracle.detach()).abs().flatten() for x in (actual, plain))
    if not error.isfinite().all():
        raise AssertionError(f"{int((~error.isfinite()).sum())} of {error.numel()} values are not finite")
    floor = torch.finfo(torch.float32).eps * max_lse
    found = []
    for name, measure in (("RMS", lambda e: e.square().mean().sqrt()), ("maximum", torch.amax)):
        got, budget = float(measure(error)), times * float(measure(allowed)) + floor
        if got > budget:
            worst = error.topk(min(5, error.numel())).indices.tolist()
            raise AssertionError(
                f"{name} error {got:.3e} is above the budget {budget:.3e}; worst at flat index {worst}"
            )
        found.append((got, budget))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
