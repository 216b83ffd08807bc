from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_F32: _ClassVar[DType]
    DTYPE_F16: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
    DTYPE_FP8_LATENT: _ClassVar[DType]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_NONE: _ClassVar[Durability]
    DURABILITY_PROCESS: _ClassVar[Durability]
    DURABILITY_HOST: _ClassVar[Durability]
DTYPE_UNSPECIFIED: DType
DTYPE_F32: DType
DTYPE_F16: DType
DTYPE_BF16: DType
DTYPE_FP8_LATENT: DType
DURABILITY_NONE: Durability
DURABILITY_PROCESS: Durability
DURABILITY_HOST: Durability

class ModelSpec(_message.Message):
    __slots__ = ("name", "n_layers", "n_q_heads", "n_kv_heads", "head_dim_qk", "head_dim_v", "kv_dtype", "softmax_scale", "logit_softcap", "kind", "latent_dim", "rope_dim", "latent_norm", "policies", "sharding")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KV: _ClassVar[ModelSpec.Kind]
        LATENT: _ClassVar[ModelSpec.Kind]
    KV: ModelSpec.Kind
    LATENT: ModelSpec.Kind
    NAME_FIELD_NUMBER: _ClassVar[int]
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    N_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_QK_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_V_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LATENT_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_DIM_FIELD_NUMBER: _ClassVar[int]
    LATENT_NORM_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    SHARDING_FIELD_NUMBER: _ClassVar[int]
    name: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    kv_dtype: DType
    softmax_scale: float
    logit_softcap: float
    kind: ModelSpec.Kind
    latent_dim: int
    rope_dim: int
    latent_norm: LatentNorm
    policies: _containers.RepeatedCompositeFieldContainer[LayerPolicy]
    sharding: Sharding
    def __init__(self, name: _Optional[str] = ..., n_layers: _Optional[int] = ..., n_q_heads: _Optional[int] = ..., n_kv_heads: _Optional[int] = ..., head_dim_qk: _Optional[int] = ..., head_dim_v: _Optional[int] = ..., kv_dtype: _Optional[_Union[DType, str]] = ..., softmax_scale: _Optional[float] = ..., logit_softcap: _Optional[float] = ..., kind: _Optional[_Union[ModelSpec.Kind, str]] = ..., latent_dim: _Optional[int] = ..., rope_dim: _Optional[int] = ..., latent_norm: _Optional[_Union[LatentNorm, _Mapping]] = ..., policies: _Optional[_Iterable[_Union[LayerPolicy, _Mapping]]] = ..., sharding: _Optional[_Union[Sharding, _Mapping]] = ...) -> None: ...

class LatentNorm(_message.Message):
    __slots__ = ("mode", "alpha", "eps")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NONE: _ClassVar[LatentNorm.Mode]
        SLICE_RMS: _ClassVar[LatentNorm.Mode]
    NONE: LatentNorm.Mode
    SLICE_RMS: LatentNorm.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    mode: LatentNorm.Mode
    alpha: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, mode: _Optional[_Union[LatentNorm.Mode, str]] = ..., alpha: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class LayerPolicy(_message.Message):
    __slots__ = ("layers", "dense", "window", "s2")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    S2_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    dense: Dense
    window: Window
    s2: S2
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., s2: _Optional[_Union[S2, _Mapping]] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Window(_message.Message):
    __slots__ = ("window_tokens", "sink_tokens")
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    window_tokens: int
    sink_tokens: int
    def __init__(self, window_tokens: _Optional[int] = ..., sink_tokens: _Optional[int] = ...) -> None: ...

class S2(_message.Message):
    __slots__ = ("block_tokens", "local_blocks", "vert_stride", "head_sliding_step", "head_sliding_offset", "num_dense_heads", "homo_head", "pattern_per", "preset")
    class PatternPer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KV_HEAD: _ClassVar[S2.PatternPer]
        Q_HEAD: _ClassVar[S2.PatternPer]
    KV_HEAD: S2.PatternPer
    Q_HEAD: S2.PatternPer
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERT_STRIDE_FIELD_NUMBER: _ClassVar[int]
    HEAD_SLIDING_STEP_FIELD_NUMBER: _ClassVar[int]
    HEAD_SLIDING_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_DENSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    HOMO_HEAD_FIELD_NUMBER: _ClassVar[int]
    PATTERN_PER_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    block_tokens: int
    local_blocks: int
    vert_stride: int
    head_sliding_step: int
    head_sliding_offset: int
    num_dense_heads: int
    homo_head: bool
    pattern_per: S2.PatternPer
    preset: str
    def __init__(self, block_tokens: _Optional[int] = ..., local_blocks: _Optional[int] = ..., vert_stride: _Optional[int] = ..., head_sliding_step: _Optional[int] = ..., head_sliding_offset: _Optional[int] = ..., num_dense_heads: _Optional[int] = ..., homo_head: bool = ..., pattern_per: _Optional[_Union[S2.PatternPer, str]] = ..., preset: _Optional[str] = ...) -> None: ...

class Sharding(_message.Message):
    __slots__ = ("mode", "groups", "alpha", "mu", "shard_tokens", "max_ranks", "exact")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        AUTO: _ClassVar[Sharding.Mode]
        HEADS: _ClassVar[Sharding.Mode]
        CONTEXT: _ClassVar[Sharding.Mode]
        LATENT: _ClassVar[Sharding.Mode]
    AUTO: Sharding.Mode
    HEADS: Sharding.Mode
    CONTEXT: Sharding.Mode
    LATENT: Sharding.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    MU_FIELD_NUMBER: _ClassVar[int]
    SHARD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANKS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    mode: Sharding.Mode
    groups: int
    alpha: _containers.RepeatedScalarFieldContainer[float]
    mu: _containers.RepeatedScalarFieldContainer[float]
    shard_tokens: int
    max_ranks: int
    exact: bool
    def __init__(self, mode: _Optional[_Union[Sharding.Mode, str]] = ..., groups: _Optional[int] = ..., alpha: _Optional[_Iterable[float]] = ..., mu: _Optional[_Iterable[float]] = ..., shard_tokens: _Optional[int] = ..., max_ranks: _Optional[int] = ..., exact: bool = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: ModelSpec
    def __init__(self, spec: _Optional[_Union[ModelSpec, _Mapping]] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("model_id", "warnings")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_id: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("model_id", "max_tokens_hint", "sharding", "close_with_stream")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_HINT_FIELD_NUMBER: _ClassVar[int]
    SHARDING_FIELD_NUMBER: _ClassVar[int]
    CLOSE_WITH_STREAM_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    max_tokens_hint: int
    sharding: Sharding
    close_with_stream: bool
    def __init__(self, model_id: _Optional[str] = ..., max_tokens_hint: _Optional[int] = ..., sharding: _Optional[_Union[Sharding, _Mapping]] = ..., close_with_stream: bool = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "at_position")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    AT_POSITION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    at_position: int
    def __init__(self, session_id: _Optional[str] = ..., at_position: _Optional[int] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class TruncateSessionRequest(_message.Message):
    __slots__ = ("session_id", "position")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    position: int
    def __init__(self, session_id: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class TruncateSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "model_id", "layer_tokens", "max_tokens", "kv_bytes", "created_unix_ms", "parent_session_id", "durability")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    PARENT_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model_id: str
    layer_tokens: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    kv_bytes: int
    created_unix_ms: int
    parent_session_id: str
    durability: Durability
    def __init__(self, session_id: _Optional[str] = ..., model_id: _Optional[str] = ..., layer_tokens: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., created_unix_ms: _Optional[int] = ..., parent_session_id: _Optional[str] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "model_id")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    model_id: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., model_id: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token", "n_total")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    N_TOTAL_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    next_page_token: str
    n_total: int
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., n_total: _Optional[int] = ...) -> None: ...

class AttendItem(_message.Message):
    __slots__ = ("session_id", "position", "n_tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    position: int
    n_tokens: int
    def __init__(self, session_id: _Optional[str] = ..., position: _Optional[int] = ..., n_tokens: _Optional[int] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("request_id", "layer", "items", "dtype", "causal", "want_lse", "append", "only_slice", "q", "k", "v")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_FIELD_NUMBER: _ClassVar[int]
    WANT_LSE_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    ONLY_SLICE_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    layer: int
    items: _containers.RepeatedCompositeFieldContainer[AttendItem]
    dtype: DType
    causal: bool
    want_lse: bool
    append: bool
    only_slice: int
    q: bytes
    k: bytes
    v: bytes
    def __init__(self, request_id: _Optional[int] = ..., layer: _Optional[int] = ..., items: _Optional[_Iterable[_Union[AttendItem, _Mapping]]] = ..., dtype: _Optional[_Union[DType, str]] = ..., causal: bool = ..., want_lse: bool = ..., append: bool = ..., only_slice: _Optional[int] = ..., q: _Optional[bytes] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_us", "compute_us", "exchange_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    exchange_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., exchange_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("request_id", "status", "timings", "durability", "lse", "out")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    status: Status
    timings: Timings
    durability: Durability
    lse: bytes
    out: bytes
    def __init__(self, request_id: _Optional[int] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., lse: _Optional[bytes] = ..., out: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "host", "backend", "device", "state", "threads", "kv_bytes_total", "kv_bytes_free", "n_steps", "busy_us")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    N_STEPS_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    rank: int
    host: str
    backend: str
    device: str
    state: str
    threads: int
    kv_bytes_total: int
    kv_bytes_free: int
    n_steps: int
    busy_us: int
    def __init__(self, rank: _Optional[int] = ..., host: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., state: _Optional[str] = ..., threads: _Optional[int] = ..., kv_bytes_total: _Optional[int] = ..., kv_bytes_free: _Optional[int] = ..., n_steps: _Optional[int] = ..., busy_us: _Optional[int] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("version", "state", "epoch", "uptime_ms", "ranks", "listen", "n_models", "n_sessions", "n_requests_queued", "n_requests_running", "n_requests_done", "n_requests_failed", "n_steps", "n_tokens_appended", "kv_bytes_total", "kv_bytes_free", "exchange", "durability")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    N_MODELS_FIELD_NUMBER: _ClassVar[int]
    N_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    N_REQUESTS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    N_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    N_REQUESTS_DONE_FIELD_NUMBER: _ClassVar[int]
    N_REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    N_STEPS_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_APPENDED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    version: str
    state: str
    epoch: int
    uptime_ms: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    listen: _containers.RepeatedScalarFieldContainer[str]
    n_models: int
    n_sessions: int
    n_requests_queued: int
    n_requests_running: int
    n_requests_done: int
    n_requests_failed: int
    n_steps: int
    n_tokens_appended: int
    kv_bytes_total: int
    kv_bytes_free: int
    exchange: str
    durability: Durability
    def __init__(self, version: _Optional[str] = ..., state: _Optional[str] = ..., epoch: _Optional[int] = ..., uptime_ms: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., listen: _Optional[_Iterable[str]] = ..., n_models: _Optional[int] = ..., n_sessions: _Optional[int] = ..., n_requests_queued: _Optional[int] = ..., n_requests_running: _Optional[int] = ..., n_requests_done: _Optional[int] = ..., n_requests_failed: _Optional[int] = ..., n_steps: _Optional[int] = ..., n_tokens_appended: _Optional[int] = ..., kv_bytes_total: _Optional[int] = ..., kv_bytes_free: _Optional[int] = ..., exchange: _Optional[str] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("begin", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: int
    end: int
    def __init__(self, begin: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class PlacementShare(_message.Message):
    __slots__ = ("rank", "kv_head_begin", "kv_head_end", "q_head_begin", "q_head_end", "ranges", "n_tokens", "kv_bytes", "freed_bytes", "truncated", "latent_begin", "latent_end")
    RANK_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_END_FIELD_NUMBER: _ClassVar[int]
    Q_HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    Q_HEAD_END_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    LATENT_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LATENT_END_FIELD_NUMBER: _ClassVar[int]
    rank: int
    kv_head_begin: int
    kv_head_end: int
    q_head_begin: int
    q_head_end: int
    ranges: _containers.RepeatedCompositeFieldContainer[TokenRange]
    n_tokens: int
    kv_bytes: int
    freed_bytes: int
    truncated: bool
    latent_begin: int
    latent_end: int
    def __init__(self, rank: _Optional[int] = ..., kv_head_begin: _Optional[int] = ..., kv_head_end: _Optional[int] = ..., q_head_begin: _Optional[int] = ..., q_head_end: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ..., n_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., freed_bytes: _Optional[int] = ..., truncated: bool = ..., latent_begin: _Optional[int] = ..., latent_end: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("session_id", "model_id", "mode", "n_head_parts", "n_ctx_parts", "shard_tokens", "shares", "reason", "n_tokens", "patterns", "n_q_heads", "n_kv_heads", "n_latent_parts", "approximate")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    N_HEAD_PARTS_FIELD_NUMBER: _ClassVar[int]
    N_CTX_PARTS_FIELD_NUMBER: _ClassVar[int]
    SHARD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    N_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    N_LATENT_PARTS_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model_id: str
    mode: str
    n_head_parts: int
    n_ctx_parts: int
    shard_tokens: int
    shares: _containers.RepeatedCompositeFieldContainer[PlacementShare]
    reason: str
    n_tokens: int
    patterns: _containers.RepeatedCompositeFieldContainer[PlacementPattern]
    n_q_heads: int
    n_kv_heads: int
    n_latent_parts: int
    approximate: bool
    def __init__(self, session_id: _Optional[str] = ..., model_id: _Optional[str] = ..., mode: _Optional[str] = ..., n_head_parts: _Optional[int] = ..., n_ctx_parts: _Optional[int] = ..., shard_tokens: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[PlacementShare, _Mapping]]] = ..., reason: _Optional[str] = ..., n_tokens: _Optional[int] = ..., patterns: _Optional[_Iterable[_Union[PlacementPattern, _Mapping]]] = ..., n_q_heads: _Optional[int] = ..., n_kv_heads: _Optional[int] = ..., n_latent_parts: _Optional[int] = ..., approximate: bool = ...) -> None: ...

class PlacementPattern(_message.Message):
    __slots__ = ("policy", "n_tokens", "floor", "kv_bytes", "freed_bytes")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    policy: LayerPolicy
    n_tokens: int
    floor: int
    kv_bytes: int
    freed_bytes: int
    def __init__(self, policy: _Optional[_Union[LayerPolicy, _Mapping]] = ..., n_tokens: _Optional[int] = ..., floor: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("n_sessions", "n_requests_finished")
    N_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    N_REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    n_sessions: int
    n_requests_finished: int
    def __init__(self, n_sessions: _Optional[int] = ..., n_requests_finished: _Optional[int] = ...) -> None: ...
