"""What the attention tests share: layouts, inputs, and attention written once more and differently."""

from __future__ import annotations

import math

import torch

from leaf_kernels import SharedPrefixLayout

BLOCK = 16  # of the interpreter's tiles


def packed(*groups: tuple[int, list[tuple[int, int]]], tail: int = 0) -> SharedPrefixLayout:
    """Groups of one root each: (length of the root, [(length of the prefix, own length), ...])."""
    own, starts, lens = [], [], []
    for root, members in groups:
        starts += [0] + [sum(own)] * len(members)
        own += [root] + [n for _, n in members]
        lens += [0] + [p for p, _ in members]
    ends = torch.tensor([0, *own]).cumsum(0)
    starts = [s if p else 0 for s, p in zip(starts, lens)]
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in (starts, lens))
    return SharedPrefixLayout(ends, starts, lens, int(ends[-1]) + tail)


def layouts() -> dict[str, SharedPrefixLayout]:
    """Together: own and prefix lengths 0, 1, BLOCK-1, BLOCK, BLOCK+1 and 3*BLOCK+7, empty segments everywhere, a tail."""
    return {
        "short": SharedPrefixLayout.from_lengths([0, BLOCK - 1, 1, 0, BLOCK + 1, 0], num_tokens=2 * BLOCK + 4),
        "long": SharedPrefixLayout.from_lengths([3 * BLOCK + 7, 2]),
        "prefix": packed((2 * BLOCK + 1, [(BLOCK, 1), (BLOCK - 1, BLOCK + 1), (2 * BLOCK, 1), (1, 0)]), (3, [(3, 2)])),
        "long_prefix": packed((0, []), (3 * BLOCK + 7, [(3 * BLOCK, BLOCK), (BLOCK + 1, BLOCK - 1)]), (2, []), tail=3),
    }


def qkv(N: int, Hq: int, Hk: int, D: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, H, D, generator=g).to(dtype).requires_grad_() for H in (Hq, Hk, Hk)]


def keep_mask(N: int) -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(3)) > 0.4


def visibility(layout: SharedPrefixLayout, keep: torch.Tensor | None, window: int | None) -> torch.Tensor:
    """[N, N] bool, from the definition."""
    N, S = layout.num_tokens, layout.num_segments
    seg, pos, rows = layout.segment_ids, layout.position_ids, torch.arange(N)
    own = (seg[:, None] == seg[None, :]) & (rows[:, None] >= rows[None, :]) & (seg[:, None] < S)
    starts = torch.cat([layout.prefix_starts, torch.zeros(1, dtype=torch.int32)])[seg][:, None]
    lens = torch.cat([layout.prefix_lens, torch.zeros(1, dtype=torch.int32)])[seg][:, None]
    visible = own | ((rows[None, :] >= starts) & (rows[None, :] < starts + lens))
    if window is not None:
        visible &= pos[:, None] - pos[None, :] < window
    if keep is not None:
        visible &= keep[None, :]
    return visible


def dense(q, k, v, layout, keep=None, scale=None, window=None, softcap=None, sinks=None):
    """One [N, N] mask over the whole pack, one softmax, in the dtype of q. Returns out, probabilities, lse."""
    N, Hq, D = q.shape
    visible = visibility(layout, keep, window)
    k, v = (x.repeat_interleave(Hq // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    lse = torch.where(visible.any(-1), torch.logsumexp(logits, -1), -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(Hq, N, 1).to(logits.dtype)], -1)
    p = torch.softmax(logits, -1)[..., :N].masked_fill(~visible, 0)
    return torch.einsum("hqk,khd->qhd", p, v), p, lse
