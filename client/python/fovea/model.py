"""model.py - what the service must know of a model: the geometry of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fovea._pb import attention_pb2 as pb
from fovea.dtypes import cache_dtype

_MODES = {
    "auto": pb.Sharding.AUTO,
    "heads": pb.Sharding.HEADS,
    "context": pb.Sharding.CONTEXT,
    "latent": pb.Sharding.LATENT,
}

_KINDS = {"kv": pb.ModelSpec.KV, "latent": pb.ModelSpec.LATENT}

_PATTERNS = {"kv_head": pb.S2.KV_HEAD, "q_head": pb.S2.Q_HEAD}


@dataclass(frozen=True)
class Dense:
    """Every token is visible (up to the query's own position, when causal)."""


@dataclass(frozen=True)
class Window:
    """A query at position p sees token j iff p - j < window_tokens or j < sink_tokens."""

    window_tokens: int  # >= 1, counts the query's own position
    sink_tokens: int = 0


@dataclass(frozen=True)
class S2:
    """S2-Attention: the last local_blocks blocks, and every vert_stride-th block before them, a different one
    for each head. Which ones exactly: proto/attention.proto. A preset ("phi3-small", "s2-16", ...) stands for
    all numbers.
    """

    block_tokens: int = 0  # 16, 32, 64, 128 or 256
    local_blocks: int = 0  # >= 1, counts the query's own
    vert_stride: int = 0  # >= 1 blocks
    head_sliding_step: int = 0  # 0 = max(1, vert_stride / n_q_heads)
    head_sliding_offset: int = 0
    num_dense_heads: int = 0  # the last ones
    homo_head: bool = False  # every head as head 0
    pattern_per: str = "kv_head"  # or "q_head"
    preset: str = ""

    def to_pb(self) -> pb.S2:
        per = _PATTERNS.get(self.pattern_per)
        if per is None:
            expected = " or ".join(_PATTERNS)
            raise ValueError(f'pattern_per: given "{self.pattern_per}", expected {expected}')
        return pb.S2(
            block_tokens=self.block_tokens,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
            head_sliding_step=self.head_sliding_step,
            head_sliding_offset=self.head_sliding_offset,
            num_dense_heads=self.num_dense_heads,
            homo_head=self.homo_head,
            pattern_per=per,
            preset=self.preset,
        )


@dataclass(frozen=True)
class LayerPolicy:
    """Which tokens a query may read, in `layers` (empty = every layer). A later entry wins."""

    policy: Dense | Window | S2
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class Sharding:
    """How a session is spread over ranks.

    mode:          "auto" (the cost model decides), "heads", "context", or "latent".
    shard_tokens:  tokens per turn of the block-cyclic context; 0 = the server's default.
    max_ranks:     0 = all.

    "latent" (TPLA, a model's only, not a session's): each of `groups` slices of the latent lives on ranks of
    its own and has a softmax of its own. That is an approximation of the model; "context" is exact.

    mu:            one factor for each slice's latent scores; empty = 1.
    exact:         the slices' scores are added up before one softmax: the model itself, slower than "context".
    """

    mode: str = "auto"
    shard_tokens: int = 0
    max_ranks: int = 0
    groups: int = 0  # 1, 2, 4 or 8
    mu: Sequence[float] = ()
    exact: bool = False

    def to_pb(self) -> pb.Sharding:
        mode = _MODES.get(self.mode)
        if mode is None:
            raise ValueError(f'sharding: given "{self.mode}", expected one of {", ".join(_MODES)}')
        return pb.Sharding(
            mode=mode,
            shard_tokens=self.shard_tokens,
            max_ranks=self.max_ranks,
            groups=self.groups,
            mu=self.mu,
            exact=self.exact,
        )


@dataclass(frozen=True)
class SliceRms:
    """Latents arrive raw: each slice c is stored as c / sqrt(alpha / groups * mean(c^2) + eps).

    alpha:  one for each slice of Sharding("latent"): the reciprocal of its share of the squared norm
            (fovea.mla.alpha_of); empty where the latent is not sliced.
    """

    eps: float
    alpha: Sequence[float] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A model's attention. Shape letters used everywhere: T tokens, Hq n_q_heads, Hkv n_kv_heads,
    dk head_dim_qk, dv head_dim_v.

    kind "latent" (MLA): latent_dim and rope_dim in place of n_kv_heads and the head dims; softmax_scale is
    explicit. q [T, Hq, latent_dim + rope_dim] in absorbed form (fovea.mla), k [T, latent_dim + rope_dim], no
    v, and the answer is [T, Hq, latent_dim].

    kv_dtype:       how K and V are stored: "f32", "f16" or "bf16"; kind "latent" also "fp8_latent" (e4m3 latents with a
                    scale for each 128 dims, bf16 RoPE keys: 656 bytes a token of 512 + 64).
    softmax_scale:  0 = 1/sqrt(dk).
    logit_softcap:  c > 0: logits become c * tanh(logit / c); 0 = off.
    """

    name: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int = 0  # not given with kind "latent"
    head_dim_qk: int = 0  # likewise
    head_dim_v: int = 0  # 0 = head_dim_qk
    kv_dtype: str = "bf16"
    softmax_scale: float = 0.0
    logit_softcap: float = 0.0
    policies: Sequence[LayerPolicy] = field(default=())
    sharding: Sharding | None = None
    kind: str = "kv"  # or "latent"
    latent_dim: int = 0  # 64..1024, a multiple of 64
    rope_dim: int = 0  # 0..128, a multiple of 8
    latent_norm: SliceRms | None = None

    def to_pb(self) -> pb.ModelSpec:
        kind = _KINDS.get(self.kind)
        if kind is None:
            raise ValueError(f'kind: given "{self.kind}", expected {" or ".join(_KINDS)}')
        spec = pb.ModelSpec(
            name=self.name,
            n_layers=self.n_layers,
            n_q_heads=self.n_q_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim_qk=self.head_dim_qk,
            head_dim_v=self.head_dim_v,
            kv_dtype=cache_dtype(self.kv_dtype),
            softmax_scale=self.softmax_scale,
            logit_softcap=self.logit_softcap,
            kind=kind,
            latent_dim=self.latent_dim,
            rope_dim=self.rope_dim,
        )
        if self.latent_norm is not None:
            spec.latent_norm.mode = pb.LatentNorm.SLICE_RMS
            spec.latent_norm.eps = self.latent_norm.eps
            spec.latent_norm.alpha.extend(self.latent_norm.alpha)
        for entry in self.policies:
            added = spec.policies.add(layers=entry.layers)
            if isinstance(entry.policy, Window):
                added.window.window_tokens = entry.policy.window_tokens
                added.window.sink_tokens = entry.policy.sink_tokens
            elif isinstance(entry.policy, S2):
                added.s2.CopyFrom(entry.policy.to_pb())
            else:
                added.dense.SetInParent()
        if self.sharding is not None:
            spec.sharding.CopyFrom(self.sharding.to_pb())
        return spec
