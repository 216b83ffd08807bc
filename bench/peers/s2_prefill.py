#!/usr/bin/env python3
"""s2_prefill.py - prefill under S2's block mask: ours beside PyTorch's flash attention and flex_attention, same run.

    bench/peers/s2_prefill.py --bench build/cuda/bin/bench_s2_cuda --out results/s2_prefill

Runs the bench first (its JSON names contexts and strides), then at each context SDPA's flash (dense and causal: it knows
no mask that skips) and flex_attention with the same mask as a BlockMask, in blocks of 128 x 64 tokens and, at one context,
of 64 x 64: the better of the two. bf16, 32/8 heads of 128, the whole context in one call. Some rows of each result are
compared with fp64 first; what is wrong or refuses is not timed, and the reason is written down. Output: OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM, BLOCK, LOCAL = 32, 8, 128, 64, 8
TOLERANCE = 6e-3  # of a row's norm: bf16 results
REPEATS = 3
SMALL_BLOCKS_AT = 32768  # tokens: flex in blocks of 64 x 64, too

Call = Callable[[], torch.Tensor]


def visible(head: int, row: int, n: int, stride: int, device: str) -> torch.Tensor:
    """Tokens that a query head's row sees; stride 0: all before it."""
    token = torch.arange(n, device=device)
    seen = token <= row
    if stride > 0:
        block = token // BLOCK
        step = max(1, stride // KV_HEADS)
        strided = (block + head // (HEADS // KV_HEADS) * step) % stride == 0
        seen &= (row // BLOCK - block < LOCAL) | strided
    return seen


def row_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, stride: int) -> float:
    n, worst = q.shape[2], 0.0
    for head, row in ((0, n - 1), (13, n // 2 + 17), (31, n // 3), (7, 5)):
        keys, values = (x[0, head // (HEADS // KV_HEADS)].double() for x in (k, v))
        scores = keys @ q[0, head, row].double() / math.sqrt(DIM)
        scores.masked_fill_(~visible(head, row, n, stride, q.device.type), -math.inf)
        want = scores.softmax(0) @ values
        error = (out[0, head, row].double() - want).norm() / want.norm()
        worst = max(worst, error.item() if torch.isfinite(error) else math.inf)
    return worst


def block_mask(n: int, stride: int, q_block: int, device: str) -> Any:
    """The mask as flex_attention takes it: for each head and block of queries, blocks seen in part and in whole."""
    from torch.nn.attention.flex_attention import BlockMask

    step = max(1, stride // KV_HEADS)
    period, slide = (torch.tensor(x, device=device) for x in (stride, step))  # captured, so that strides share code
    group = HEADS // KV_HEADS

    def mask_mod(_b: Any, h: Any, row: Any, token: Any) -> Any:
        strided = (token // BLOCK + h // group * slide) % period == 0
        return (token <= row) & ((row // BLOCK - token // BLOCK < LOCAL) | strided)

    first = torch.arange(0, n, q_block, device=device) // BLOCK  # block of each query block's first row
    last = first + q_block // BLOCK - 1
    block = torch.arange(n // BLOCK, device=device)
    head = torch.arange(KV_HEADS, device=device)[:, None, None] * step
    strided = (block + head) % stride == 0
    some = (block <= last[:, None]) & ((first[:, None] - block < LOCAL) | strided)
    whole = (block < first[:, None]) & ((last[:, None] - block < LOCAL) | strided)

    def ordered(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = seen.sum(-1, dtype=torch.int32)
        index = torch.argsort(seen.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
        return tuple(x.repeat_interleave(group, 0)[None].contiguous() for x in (count, index))  # type: ignore[return-value]

    return BlockMask.from_kv_blocks(
        *ordered(some & ~whole), *ordered(whole), BLOCK_SIZE=(q_block, BLOCK), mask_mod=mask_mod
    )


_flex: list[Any] = []


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stride: int, q_block: int) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex:
        _flex.append(torch.compile(flex_attention, dynamic=False))
    mask = block_mask(q.shape[2], stride, q_block, q.device.type)
    options = {"BLOCK_M": q_block, "BLOCK_N": BLOCK}
    return lambda: _flex[0](q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def measure(prepare: Callable[[], Call], inputs: tuple[torch.Tensor, ...], stride: int) -> dict[str, Any]:
    try:
        call = prepare()
        error = row_error(*inputs, call(), stride)  # type: ignore[call-arg]
        if not error <= TOLERANCE:
            return {"why": f"wrong: error {error:.1e} of the row"}
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return {"us": sorted(times)[len(times) // 2], "row_error": error}
    except Exception as error:  # noqa: BLE001 - a peer that refuses must not end the others
        text = str(error).strip().splitlines()
        return {"why": f"{type(error).__name__}: {text[0][:160] if text else ''}"}


def our_lines(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = Path(f"{options.out}-ours.jsonl")
    if options.bench:
        subprocess.run([options.bench, str(path), "prefill"], check=True, timeout=options.seconds)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["case"].startswith("prefill")]


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| context | stride | ours us | own dense / ours | block counts | flash (dense) us | flash / ours | flex us | flex / ours |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [row["context"], row["stride"], f"**{row['ours']['us']:.0f}**", f"{row['ours']['ratio']:.2f}"]
        cells.append(f"{row['ours']['ceiling']:.2f}")
        for name in ("flash", "flex"):
            us = row[name].get("us")
            cells += ["-", "-"] if us is None else [f"{us:.0f}", f"{us / row['ours']['us']:.2f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", help="bench_s2_cuda; without it OUT-ours.jsonl of an earlier run is read")
    parser.add_argument("--out", default="s2_prefill", help="prefix of the files that are written")
    parser.add_argument("--seconds", type=float, default=200, help="no new case is begun after so long")
    options = parser.parse_args()
    begin = time.monotonic()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    dense: dict[int, dict[str, Any]] = {}
    for line in our_lines(options):
        n, stride = int(line["case"].split()[1].removesuffix("k")) * 1024, line["stride"]
        if time.monotonic() - begin > options.seconds:
            print("no time left for:", line["case"], stride)
            continue
        generator = torch.Generator("cuda").manual_seed(7)
        inputs = tuple(
            torch.randn((1, heads, n, DIM), generator=generator, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        if n not in dense:
            dense[n] = measure(lambda: flash(*inputs), inputs, 0)  # noqa: B023
        row = {"context": line["case"], "stride": stride, "ours": line, "flash": dense[n], "flex": {}}
        if stride > 0:
            blocks = (64, 128) if n == SMALL_BLOCKS_AT else (128,)  # compiling takes long
            tries = {m: measure(lambda: flex(*inputs, stride, m), inputs, stride) for m in blocks}  # noqa: B023
            row["flex_by_block"] = tries
            row["flex"] = min(tries.values(), key=lambda figure: figure.get("us", math.inf))
        rows.append(row)
        print(row["context"], stride, line["us"], row["flash"], row.get("flex_by_block"), flush=True)
    versions = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    Path(f"{options.out}.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    text = "\n".join([f"{versions}", "", *table(rows)])
    Path(f"{options.out}.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
