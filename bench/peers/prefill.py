#!/usr/bin/env python3
"""prefill.py - PyTorch's attention kernels at bench_prefill_cuda's shapes, same GPU, same run.

    bench/peers/prefill.py [--out FILE.json] [--flex] [--device cpu --shrink 64]

SDPA with flash attention and cuDNN, flex_attention (--flex: compiling takes long), and a matrix product of 8192 for scale. bf16,
32 query and 8 KV heads, d = 128, random data, contiguous KV; GPU time of a call by events, median. A causal mask counts
half. Each result is compared with fp32 on a few rows first; what is wrong or refuses is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPES = [
    (causal, batch, tokens) for causal in (True, False) for batch, tokens in ((4, 4096), (1, 16384), (1, 32768))
]
CALLS = 9
TOLERANCE = 1e-2  # of a row's norm

Call = Callable[[], torch.Tensor]


def seconds(call: Callable[[], object], device: str) -> float:
    call()
    times = []
    for _ in range(CALLS):
        if device == "cpu":
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def row_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, causal: bool) -> float:
    worst = 0.0
    tokens = q.shape[2]
    for token, head in ((0, 0), (tokens // 2, HEADS // 2), (tokens - 1, HEADS - 1)):
        n = token + 1 if causal else tokens
        kv = head // (HEADS // KV_HEADS)
        scores = (k[0, kv, :n].float() @ q[0, head, token].float()) / math.sqrt(DIM)
        want = torch.softmax(scores, 0) @ v[0, kv, :n].float()
        worst = max(worst, float((out[0, head, token].float() - want).norm() / want.norm()))
    return worst


def sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    options = parser.parse_args()
    rows = []

    a = torch.randn(8192 // options.shrink, 8192 // options.shrink, dtype=torch.bfloat16, device=options.device)
    rate = 2.0 * a.shape[0] ** 3 / seconds(lambda: a @ a, options.device) * 1e-12
    print(f"torch {torch.__version__}, matrix product of {a.shape[0]}: {rate:.0f} TFLOP/s", flush=True)
    rows.append({"case": f"matmul {a.shape[0]}", "peer": "cuBLAS", "tflops": rate})
    for causal, batch, full in SHAPES:
        tokens = full // options.shrink
        q, k, v = (
            torch.randn(batch, heads, tokens, DIM, dtype=torch.bfloat16, device=options.device)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        flop = 4.0 * batch * HEADS * DIM * tokens * tokens * (0.5 if causal else 1.0)
        peers: dict[str, Callable[[], Call]] = {
            "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
            "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
        }
        if options.flex:
            peers["flex"] = lambda: flex(q, k, v, causal)
        line = f"{'causal' if causal else 'full'} b{batch} {tokens}"
        for name, make in peers.items():
            try:
                call = make()
                error = row_error(q, k, v, call(), causal)
                if not error <= TOLERANCE:
                    raise ValueError(f"error {error:.3g} of a row")
                rate = flop / seconds(call, options.device) * 1e-12
            except Exception as why:  # noqa: BLE001 - a peer that refuses has no figure
                print(f"{line}: {name}: {str(why).splitlines()[0]}")
                continue
            rows.append({"case": line, "peer": name, "tflops": rate, "row_error": error})
            print(f"{line:18} {name:6} {rate:7.1f} TFLOP/s err {error:.1e}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
