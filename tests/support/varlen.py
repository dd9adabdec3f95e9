"""What ``torch.nn.attention.varlen.varlen_attn`` does, on the CPU: it has a kernel on GPUs alone.

Written from its documentation (torch 2.13) and held to it by tests/trainer/test_varlen.py: the same signature, and the
same shapes as its own fake kernel. ``python -m bench.gpu --parts packing`` compares the real kernel with a mask.
"""

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attention (tokens, heads, size) within each sequence: token i sees j with i - left <= j <= i + right.

    -1 is no limit. Each head of keys is shared by neighbouring heads of queries.
    """
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k), "lengths of queries and keys differ: not written here"
    assert (int(cu_seq_q[0]), int(cu_seq_q[-1])) == (0, len(query))
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] == value.shape[-1]
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    groups = query.shape[1] // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    left, right = window_size
    found = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (one[start:end].transpose(0, 1) for one in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= distance >= -right
        scores = (q @ k.transpose(1, 2) * factor).masked_fill(~seen, float("-inf"))
        found.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1))
    return torch.cat(found)
