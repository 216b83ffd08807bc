"""placement.py - a session's placement as text for people."""

from __future__ import annotations

from fovea._pb import attention_pb2 as pb

_BAR = 32


def format_placement(placement: pb.Placement) -> str:
    """A line for each share (rank, heads, tokens, bytes, a bar of the context it holds) and each sparse policy."""
    lines = [
        f"session {placement.session_id}: {placement.mode}, {placement.n_tokens} tokens",
    ]
    if placement.approximate:
        lines.append("  an approximation: each slice of the latent has a softmax of its own")
    if placement.reason:
        lines.append(f"  why: {placement.reason}")
    for share in placement.shares:
        heads = f"KV heads {share.kv_head_begin}-{share.kv_head_end - 1}"
        if share.latent_end > 0:
            heads = f"latent {share.latent_begin}-{share.latent_end - 1}"
        q_heads = f"q heads {share.q_head_begin}-{share.q_head_end - 1}"
        lines.append(
            f"  rank {share.rank:<3} {heads:<14} {q_heads:<14} |{_bar(placement, share)}| "
            f"{share.n_tokens:>6} tokens  {_bytes(share.kv_bytes)}"
        )
    for pattern in placement.patterns:
        kind = pattern.policy.WhichOneof("policy")
        lines.append(
            f"  {len(pattern.policy.layers)} {kind} layers keep {_bytes(pattern.kv_bytes)}, "
            f"have freed {_bytes(pattern.freed_bytes)}"
        )
    return "\n".join(lines)


def _bar(placement: pb.Placement, share: pb.PlacementShare) -> str:
    """The context from left to right; filled where this rank holds tokens."""
    total = max(placement.n_tokens, 1)
    cells = []
    for i in range(_BAR):
        begin, end = i * total / _BAR, (i + 1) * total / _BAR
        held = any(r.begin < end and begin < r.end for r in share.ranges)
        cells.append("#" if held else ".")
    return "".join(cells)


def _bytes(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
