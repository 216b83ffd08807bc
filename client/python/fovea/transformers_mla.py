"""transformers_mla.py - what fovea.transformers does for models with multi-head latent attention.

DeepSeek-V2, V3 and their kin hand the compressed latents to the cache and expand them for the attention
function. With Fovea the latents go on as they are: serve_latents() makes a model leave them so when they come
out of a FoveaCache, and the query and the answer are taken through W_UK and W_UV here. generate() calls it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_LATENT = "_fovea_latent"  # of a key: the module's latents, not expanded; the value is the RoPE key
MARK = "_fovea_layer"  # of a key: which layer of which FoveaCache it belongs to


def serve_latents(model: torch.nn.Module) -> None:
    """For a FoveaCache to serve a model of this kind. Again, and of other models: changes nothing."""
    for module in model.modules():
        if not hasattr(module, "kv_b_proj") or not hasattr(module, "expand_kv"):
            continue
        if not hasattr(module.expand_kv, "_fovea"):
            module.expand_kv = _keep_latents(module.expand_kv)


def _keep_latents(expand: Any) -> Any:
    @functools.wraps(expand)
    def keep(latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(latent, MARK):  # another cache's, or none's
            expanded: tuple[torch.Tensor, torch.Tensor] = expand(latent, k_rope)
            return expanded
        setattr(latent, _LATENT, True)
        return latent, k_rope

    keep._fovea = True  # type: ignore[attr-defined]
    return keep


def is_latent(key: torch.Tensor) -> bool:
    return hasattr(key, _LATENT)


def absorb(
    module: torch.nn.Module, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, H, T, dn + R], latent [B, 1, T, L], k_rope [B, 1, T, R]
    -> q [B, H, T, L + R], k [B, 1, T, L + R].
    """
    w_uk, _ = _up_projections(module)
    q_nope, q_rope = query.split([w_uk.shape[1], query.shape[3] - w_uk.shape[1]], dim=-1)
    absorbed = torch.einsum("bhtd,hdl->bhtl", q_nope, w_uk)
    return torch.cat([absorbed, q_rope], dim=-1), torch.cat([latent, k_rope], dim=-1)


def expand(module: torch.nn.Module, out: torch.Tensor) -> torch.Tensor:
    """out [B, T, H, L] -> [B, T, H, dv]."""
    _, w_uv = _up_projections(module)
    return torch.einsum("bthl,hdl->bthd", out, w_uv)


def _up_projections(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK [H, dn, L] and W_UV [H, dv, L]."""
    w = module.kv_b_proj.weight
    by_head = w.view(module.num_heads, module.qk_nope_head_dim + module.v_head_dim, w.shape[1])
    return by_head[:, : module.qk_nope_head_dim], by_head[:, module.qk_nope_head_dim :]
