"""transformers.py - Hugging Face models with their KV cache and attention in Fovea.

    import fovea.transformers

    fovea.transformers.register("127.0.0.1:7411")
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fovea")
    model.generate(**inputs)

generate() makes a FoveaCache by itself; make one yourself to keep it across calls, to choose how it is
stored or sharded, or to call model(...) directly:

    cache = fovea.transformers.FoveaCache(model.config)
    model.generate(**inputs, past_key_values=cache)

How it fits together. A model's layer first calls the cache's update(k, v), then the attention function
with what update() returned. FoveaCache stores nothing: update() hands k and v through, marked with the
layer they belong to; the attention function finds the mark and sends q, k and v as one request, an item
per row of the batch. A row of the batch is a session. Padding never leaves this process: only real tokens
are sent, so left padding (and any other) needs no mask in the service.

What a request can not say is refused with an error, never ignored: custom 4D masks, packed sequences,
attention sinks that are parameters of the model, dropout, gradients, cross attention.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface

from fovea.attend import Item
from fovea.client import Client, connect
from fovea.errors import FoveaError
from fovea.model import LayerPolicy, ModelSpec, Sharding, Window
from fovea.session import Session
from fovea.transformers_mla import MARK, absorb, expand, is_latent, serve_latents

NAME = "fovea"

_KV_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_default_client: Client | None = None


def register(address: str | Client) -> Client:
    """Makes attn_implementation="fovea" known, served at `address`. Again = another service from now on.

    Returns the client (close it when the process is done with the service).
    """
    global _default_client
    _default_client = connect(address) if isinstance(address, str) else address
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    _make_generate_use_fovea_cache()
    return _default_client


class FoveaCache(Cache):
    """The KV cache of a batch of sequences, one session each. A context manager; closed when collected.

    config:           the model's (its text part is used).
    kv_dtype:         how the service stores K and V; None = as the model computes them.
    max_tokens_hint:  guides placement, reserves nothing.
    """

    def __init__(
        self,
        config: Any,
        client: Client | None = None,
        *,
        kv_dtype: str | None = None,
        sharding: Sharding | None = None,
        max_tokens_hint: int = 0,
    ) -> None:
        if client is None and _default_client is None:
            raise RuntimeError("no service: call fovea.transformers.register(address) first, or pass client=")
        self.config = config.get_text_config(decoder=True)
        self.client: Client = client or _default_client  # type: ignore[assignment]
        self.kv_dtype, self.sharding, self.max_tokens_hint = kv_dtype, sharding, max_tokens_hint
        self.sessions: list[Session] = []  # one per row of the batch, opened by the first attention
        self.real: npt.NDArray[np.bool_] = np.zeros((0, 0), bool)  # [B, columns]: a token, not padding
        self.spec: ModelSpec | None = None
        windows = _layer_windows(self.config)
        super().__init__(layers=[FoveaLayer(self, i, window) for i, window in enumerate(windows)])
        # the sessions' list is changed in place only, so that this sees the current one
        self._finalizer = weakref.finalize(self, _close_quietly, self.sessions)

    def close(self) -> None:
        """Closes the sessions; the cache is empty again."""
        self._replace_sessions([])
        self.real = np.zeros((0, 0), bool)
        for layer in self.layers:
            layer.n_columns = 0

    def __enter__(self) -> FoveaCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what generate() asks for

    def reset(self) -> None:
        self.close()

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: removes that many columns. Positive (older transformers): keeps that many."""
        have = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, have + tokens_to_remove)
        if keep >= have:
            return
        self.real = self.real[:, :keep]
        for session, n_tokens in zip(self.sessions, self.real.sum(axis=1), strict=True):
            session.truncate(int(n_tokens))
        for layer in self.layers:
            layer.n_columns = min(layer.n_columns, keep)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]: forks, which copy no KV until they are written to."""
        self._select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(len(self.sessions))[indices.cpu()]
        self._select_rows(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows([row for row in range(len(self.sessions)) for _ in range(repeats)])

    def _select_rows(self, rows: list[int]) -> None:
        if not self.sessions:
            return
        taken: set[int] = set()
        selected: list[Session] = []
        for row in rows:
            selected.append(self.sessions[row].fork() if row in taken else self.sessions[row])
            taken.add(row)
        self._replace_sessions(selected)
        self.real = self.real[rows]

    def _replace_sessions(self, sessions: list[Session]) -> None:
        kept = {id(session) for session in sessions}
        dropped = [session for session in self.sessions if id(session) not in kept]
        self.sessions[:] = sessions
        for session in dropped:
            session.close()

    # ------------------------------------------------------------------ what the attention needs

    def prepare(self, n_rows: int, n_columns: int, mask: torch.Tensor | None) -> None:
        """Notes which columns [B, n_columns] are real tokens; they may not change later."""
        now = np.ones((n_rows, n_columns), bool) if mask is None else mask.cpu().numpy().astype(bool)
        if now.shape != (n_rows, n_columns):
            raise ValueError(f"attention_mask: given {list(now.shape)}, expected {[n_rows, n_columns]}")
        n_known = min(self.real.shape[1], n_columns)
        if n_known and mask is not None and not np.array_equal(now[:, :n_known], self.real[:, :n_known]):
            raise ValueError("attention_mask: differs from the one that earlier tokens were given with")
        if n_columns > self.real.shape[1]:
            self.real = np.concatenate([self.real.reshape(n_rows, -1), now[:, n_known:]], axis=1)

    def open(
        self, n_rows: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, rope: int, options: Any
    ) -> None:
        """Opens a session per row, once the first attention shows the model's geometry."""
        if self.sessions and len(self.sessions) != n_rows:
            raise ValueError(f"batch size: given {n_rows}, the cache has {len(self.sessions)} rows")
        if self.sessions:
            return
        spec = ModelSpec(
            name=str(getattr(self.config, "model_type", "model"))[:63],
            n_layers=len(self.layers),
            n_q_heads=q.shape[1],
            n_kv_heads=k.shape[1] if v is not None else 0,
            head_dim_qk=q.shape[3] if v is not None else 0,
            head_dim_v=v.shape[3] if v is not None else 0,
            kind="kv" if v is not None else "latent",
            latent_dim=0 if v is not None else k.shape[3] - rope,
            rope_dim=rope,
            kv_dtype=self.kv_dtype or _KV_DTYPES[k.dtype],
            softmax_scale=options["scaling"] or 0.0,
            logit_softcap=options["softcap"] or 0.0,
            policies=_policies([layer.window for layer in self.layers]),
            sharding=self.sharding,
        )
        model_id = self.client.register_model(spec)
        self.spec = spec
        for _ in range(n_rows):
            self.sessions.append(self.client.open_session(model_id, self.max_tokens_hint))


class FoveaLayer(CacheLayerMixin):
    """One layer of a FoveaCache: how many columns were appended, and nothing else.

    Rows are changed through the cache, since a session holds all layers.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: FoveaCache, index: int, window: int | None) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.index = index
        self.window = window
        self.n_columns = 0

    @property
    def cache(self) -> FoveaCache:
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the FoveaCache of this layer is gone")
        return cache

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the new k and v, marked, for attention() to find."""
        self.is_initialized = True
        setattr(key_states, MARK, self)
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.n_columns

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        n_queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.n_columns + n_queries, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions

    def reset(self) -> None:
        self.cache.close()


def padding_mask(
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask interface: only the padding [B, columns]; causality and windows are the service's."""
    if use_vmap or not allow_is_causal_skip:
        raise NotImplementedError("fovea: only causal and sliding-window masks with padding can be served")
    return attention_mask


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface: query [B, Hq, T, dk], key [B, Hkv, T, dk], value [B, Hkv, T, dv], the new
    tokens only -> [B, T, Hq, dv].
    """
    _check_supported(module, query, attention_mask, kwargs)
    layer = _layer_of(key)
    cache = layer.cache
    if sliding_window is not None and sliding_window != layer.window:
        raise NotImplementedError(
            f"layer {layer.index}: sliding_window {sliding_window}, but the config says {layer.window}"
        )
    n_rows, n_new = query.shape[0], query.shape[2]
    begin, end = layer.n_columns, layer.n_columns + n_new
    out_dim, rope, v_or_none = value.shape[3], 0, value
    if is_latent(key):
        rope, out_dim, v_or_none = value.shape[3], key.shape[3], None
        query, key = absorb(module, query, key, value)
    cache.open(n_rows, query, key, v_or_none, rope, {"scaling": scaling, "softcap": softcap})
    cache.prepare(n_rows, end, attention_mask)

    new = cache.real[:, begin:end]
    positions = cache.real[:, :begin].sum(axis=1)
    counts = new.sum(axis=1)
    items = [
        Item(session.id, int(position), int(count))
        for session, position, count in zip(cache.sessions, positions, counts, strict=True)
        if count
    ]
    packed = torch.from_numpy(new).to(query.device)
    out = query.new_zeros(n_rows, n_new, query.shape[1], out_dim)  # padding rows stay 0
    if items:
        q, k = (_to_numpy(t.transpose(1, 2)[packed]) for t in (query, key))
        v = None if v_or_none is None else _to_numpy(v_or_none.transpose(1, 2)[packed])
        dtype = "bf16" if query.dtype == torch.bfloat16 else None
        result = cache.client.attend(layer.index, items, q, k, v, dtype=dtype)
        out[packed] = _from_numpy(result.out, query)
    layer.n_columns = end
    return out if v_or_none is not None else expand(module, out), None


def _layer_of(key: torch.Tensor) -> FoveaLayer:
    layer: FoveaLayer | None = getattr(key, MARK, None)
    if layer is None:
        raise ValueError(
            "attn_implementation='fovea' keeps its KV in a FoveaCache: pass "
            "past_key_values=fovea.transformers.FoveaCache(model.config), and leave use_cache on "
            "(models with latent attention: fovea.transformers.serve_latents(model) first)"
        )
    return layer


def _check_supported(
    module: torch.nn.Module,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if query.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("fovea: inference only; wrap the call in torch.no_grad()")
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError(f"fovea: given a mask of shape {list(mask.shape)}, expected padding [B, N]")
    if kwargs.get("dropout") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("fovea: dropout and learned attention sinks are not served")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotImplementedError("fovea: only causal self-attention is served here")


def _layer_windows(config: Any) -> list[int | None]:
    """The sliding window of every layer, None where there is none."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * int(config.num_hidden_layers)
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise NotImplementedError(f"fovea: layers of type {', '.join(unknown)} are not served")
    return [known[kind] for kind in types]


def _policies(windows: Sequence[int | None]) -> list[LayerPolicy]:
    sizes = sorted({w for w in windows if w is not None})
    return [LayerPolicy(Window(w), [i for i, each in enumerate(windows) if each == w]) for w in sizes]


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def _from_numpy(array: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(array.copy()).to(like.device)


def _close_quietly(sessions: list[Session]) -> None:
    """At collection time: the service may be gone already, and nobody is there to be told."""
    for session in sessions:
        try:
            session.close()
        except FoveaError:
            return


def _make_generate_use_fovea_cache() -> None:
    """generate() without past_key_values makes a DynamicCache; for models that use us, a FoveaCache."""
    original = getattr(GenerationMixin, "_prepare_cache_for_generation", None)
    if original is None or hasattr(original, "_fovea"):
        return  # an unknown version: past_key_values must be passed; or done already

    @functools.wraps(original)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        uses_fovea = getattr(self.config.get_text_config(decoder=True), "_attn_implementation", None) == NAME
        if uses_fovea and generation_config.use_cache is not False and _default_client is not None:
            serve_latents(self)
            if model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = FoveaCache(self.config)
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    prepare._fovea = True  # type: ignore[attr-defined]
    GenerationMixin._prepare_cache_for_generation = prepare
