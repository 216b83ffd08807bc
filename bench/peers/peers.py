#!/usr/bin/env python3
"""peers.py - other libraries' decode kernels at bench_kernels_cuda's shapes, same GPU, same run.

    bench/peers/peers.py --bench build/cuda/bin/bench_kernels_cuda --out results/peers [--only "gqa32/8 b1"]

Runs the bench first (its JSON names the shapes: one list), then every peer at each shape that it can do:

    sdpa-cudnn, -flash, -efficient   PyTorch's scaled_dot_product_attention; uniform lengths, contiguous KV
    varlen-flash                     PyTorch's variable-length flash attention; contiguous KV
    flex                             flex_attention compiled for decode; a few shapes (compiling takes long)
    fi-tensor, fi-cuda               FlashInfer's paged decode on tensor and CUDA cores, pages of 16 shuffled
                                     over the pool; where flashinfer_build.sh's folder is beside this file

All alike: bf16, random data, sets of inputs over 1 GiB taking turns so that no cache holds them, a CUDA graph
of calls, median of 5 replays, GPU time of a call; planning and page tables are made before. Each result is
compared with fp64 first; what is wrong or refuses is not timed, and the reason is written down.
--device cpu --shrink 64 tries the script without a GPU. Output: OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent))
from flashinfer_decode import FlashInfer  # noqa: E402

SET_BYTES = 1 << 30
SETS_MAX = 64
REPLAYS = 5
TOLERANCE = 6e-3  # of a row's norm: bf16 results
PAGE = 16

Call = Callable[[], torch.Tensor]


class CanNotError(Exception):
    """Why a peer has no figure at a shape."""


@dataclass(frozen=True)
class Shape:
    name: str
    kv_heads: int
    group: int
    head_dim: int
    lengths: tuple[int, ...]
    ours: dict[str, Any]

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def is_uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def kv_bytes(self) -> int:
        return self.n_tokens * self.kv_heads * self.head_dim * 4

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)


class Pool:
    """K and V of everything: two tensors of random bf16 that every shape takes views of."""

    def __init__(self, device: str, n_bytes: int) -> None:
        self.device = device
        self.n_elems = n_bytes // 4
        generator = torch.Generator(device).manual_seed(20261122)
        self.k, self.v = (torch.empty(self.n_elems, dtype=torch.bfloat16, device=device) for _ in range(2))
        for tensor in (self.k, self.v):
            for chunk in tensor.split(1 << 28):
                chunk.normal_(generator=generator)

    def n_sets(self, shape: Shape) -> int:
        fit = self.n_elems * 4 // max(shape.kv_bytes, 1)
        return min(SETS_MAX, math.ceil(SET_BYTES / shape.kv_bytes) + 1, fit)

    def contiguous(self, shape: Shape, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Set i as [tokens of all items, Hkv, d]."""
        n = shape.n_tokens * shape.kv_heads * shape.head_dim
        view = (shape.n_tokens, shape.kv_heads, shape.head_dim)
        return self.k[i * n : (i + 1) * n].view(view), self.v[i * n : (i + 1) * n].view(view)


def queries(shape: Shape, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(7)
    size = (len(shape.lengths), shape.q_heads, shape.head_dim)
    return torch.randn(size, generator=generator, device=device, dtype=torch.float32).bfloat16()


# ---------------------------------------------------------------- reference

# tokens [n, Hkv, d] of K and V of one item of set 0
Tokens = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def row_error(shape: Shape, q: torch.Tensor, tokens: Tokens, out: torch.Tensor) -> float:
    """Largest error of a row relative to its norm; first, middle and last of items and of heads."""
    worst = 0.0
    out = out.reshape(len(shape.lengths), shape.q_heads, shape.head_dim)
    for item in {0, len(shape.lengths) // 2, len(shape.lengths) - 1}:
        k, v = tokens(item)
        for head in {0, shape.q_heads // 2, shape.q_heads - 1}:
            scores = k[:, head // shape.group].double() @ q[item, head].double() * shape.scale
            want = scores.softmax(0) @ v[:, head // shape.group].double()
            error = (out[item, head].double() - want).norm() / want.norm()
            worst = max(worst, error.item() if torch.isfinite(error) else math.inf)
    return worst


# ---------------------------------------------------------------- peers

# of a shape: one call for each set, and where the tokens of set 0 are
Prepared = tuple[list[Call], Tokens]


def contiguous_tokens(shape: Shape, pool: Pool) -> Tokens:
    k, v = pool.contiguous(shape, 0)
    begins = [0]
    for n in shape.lengths:
        begins.append(begins[-1] + n)
    return lambda i: (k[begins[i] : begins[i + 1]], v[begins[i] : begins[i + 1]])


def sdpa(backend: SDPBackend) -> Callable[[Shape, Pool, torch.Tensor], Prepared]:
    def prepare(shape: Shape, pool: Pool, q: torch.Tensor) -> Prepared:
        if not shape.is_uniform:
            raise CanNotError("ragged")
        if backend == SDPBackend.EFFICIENT_ATTENTION and shape.group > 1:
            raise CanNotError("no GQA")
        batch, n = len(shape.lengths), shape.lengths[0]
        q4 = q.view(batch, shape.q_heads, 1, shape.head_dim)

        def call(i: int) -> Call:
            k, v = (
                t.view(batch, n, shape.kv_heads, shape.head_dim).transpose(1, 2)
                for t in pool.contiguous(shape, i)
            )

            def run() -> torch.Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q4, k, v, enable_gqa=shape.group > 1)

            return run

        return [call(i) for i in range(pool.n_sets(shape))], contiguous_tokens(shape, pool)

    return prepare


def varlen(shape: Shape, pool: Pool, q: torch.Tensor) -> Prepared:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise CanNotError(str(error)) from error
    begins_q = torch.arange(len(shape.lengths) + 1, device=q.device, dtype=torch.int32)
    begins_k = torch.tensor((0, *shape.lengths), device=q.device).cumsum(0).to(torch.int32)

    def call(i: int, **extra: Any) -> Call:
        k, v = pool.contiguous(shape, i)
        return lambda: varlen_attn(q, k, v, begins_q, begins_k, 1, max(shape.lengths), **extra)

    extra: dict[str, Any] = {}
    if shape.group > 1:
        try:
            call(0, enable_gqa=True)()
            extra = {"enable_gqa": True}
        except TypeError:  # versions that have no such option broadcast by themselves, or refuse
            pass
    return [call(i, **extra) for i in range(pool.n_sets(shape))], contiguous_tokens(shape, pool)


FLEX_SHAPES = ("gqa32/8 b16 4k", "gqa32/8 b16 32k", "gqa32/8 b64 4k")
_flex: list[Callable[..., torch.Tensor]] = []


def flex(shape: Shape, pool: Pool, q: torch.Tensor) -> Prepared:
    if shape.name not in FLEX_SHAPES:
        raise CanNotError("not tried: compiling takes long")
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex:
        _flex.append(torch.compile(flex_attention, dynamic=False))
    batch, n = len(shape.lengths), shape.lengths[0]
    q4 = q.view(batch, shape.q_heads, 1, shape.head_dim)

    def call(i: int) -> Call:
        k, v = (
            t.view(batch, n, shape.kv_heads, shape.head_dim).transpose(1, 2)
            for t in pool.contiguous(shape, i)
        )
        return lambda: _flex[0](q4, k, v, enable_gqa=shape.group > 1)

    return [call(i) for i in range(pool.n_sets(shape))], contiguous_tokens(shape, pool)


def flashinfer(
    library: FlashInfer | None, use_tensor_cores: bool
) -> Callable[[Shape, Pool, torch.Tensor], Prepared]:
    def prepare(shape: Shape, pool: Pool, q: torch.Tensor) -> Prepared:
        if library is None:
            raise CanNotError("not carried")
        page_elems = PAGE * shape.kv_heads * shape.head_dim
        n_pages = pool.n_elems // page_elems
        k, v = (
            t[: n_pages * page_elems].view(n_pages, PAGE, shape.kv_heads, shape.head_dim)
            for t in (pool.k, pool.v)
        )
        counts = [math.ceil(n / PAGE) for n in shape.lengths]
        order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(3))
        n_sets = min(pool.n_sets(shape), n_pages // sum(counts))
        tables = [
            order[i * sum(counts) : (i + 1) * sum(counts)].to(q.device, torch.int32) for i in range(n_sets)
        ]
        calls = library.plan(q, k, v, shape.lengths, PAGE, tables, shape.scale, use_tensor_cores)

        def tokens(item: int) -> tuple[torch.Tensor, torch.Tensor]:
            begin = sum(counts[:item])
            pages = tables[0][begin : begin + counts[item]].long()
            return tuple(t[pages].flatten(0, 1)[: shape.lengths[item]] for t in (k, v))  # type: ignore[return-value]

        return calls, tokens

    return prepare


# ---------------------------------------------------------------- time


def time_calls(calls: list[Call], kv_bytes: int, device: str) -> float:
    """Microseconds of a call."""
    least = 8 if kv_bytes > 3e9 else 40
    rounds = math.ceil(least / len(calls))
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls) * 1e6
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def measure(
    prepare: Callable[[Shape, Pool, torch.Tensor], Prepared], shape: Shape, pool: Pool, q: torch.Tensor
) -> dict[str, Any]:
    if pool.n_sets(shape) < 1:
        return {"why": f"needs {shape.kv_bytes / 1e9:.0f} GB"}
    try:
        calls, tokens = prepare(shape, pool, q)
        error = row_error(shape, q, tokens, calls[0]())
        if not error <= TOLERANCE:
            return {"why": f"wrong: error {error:.1e} of the row"}
        return {"us": time_calls(calls, shape.kv_bytes, pool.device), "row_error": error, "sets": len(calls)}
    except CanNotError as error:
        return {"why": str(error)}
    except Exception as error:  # noqa: BLE001 - a peer that refuses must not end the others
        return {
            "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
        }


# ---------------------------------------------------------------- report


def run_bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = Path(f"{options.out}-ours.jsonl")
    if options.bench:
        command = [options.bench, str(path), str(options.gib), options.only]
        print("$", *command, flush=True)
        subprocess.run(command, check=True, stdout=sys.stdout, timeout=options.seconds)
    return [json.loads(line) for line in path.read_text().splitlines()]


def shapes_of(lines: list[dict[str, Any]], shrink: int) -> Iterator[Shape]:
    for line in lines:
        lengths = tuple(max(1, n // shrink) for n in line["lengths"])
        yield Shape(line["case"], line["kv_heads"], line["group"], line["head_dim"], lengths, line)


def table(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    lines = [
        "| case | floor us | ours | " + " | ".join(names) + " | best peer / ours |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        times = {name: row["peers"][name].get("us") for name in names}
        known = [us for us in times.values() if us is not None]
        cells = [f"{us:.1f}" if us is not None else "-" for us in times.values()]
        best = f"{min(known) / row['ours_us']:.3f}" if known else "-"
        lines.append(
            f"| {row['case']} | {row['floor_us']:.1f} | **{row['ours_us']:.1f}** | "
            + " | ".join(cells)
            + f" | {best} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bench", help="bench_kernels_cuda; without it OUT-ours.jsonl of an earlier run is read"
    )
    parser.add_argument("--out", default="peers", help="prefix of the files that are written")
    parser.add_argument("--only", default="", help="cases whose name contains it")
    parser.add_argument("--gib", type=float, default=0, help="GPU memory for KV (0: most of what is free)")
    parser.add_argument("--seconds", type=float, default=380, help="no new shape is begun after so long")
    parser.add_argument("--flashinfer", default=Path(__file__).parent / "flashinfer", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides all lengths")
    options = parser.parse_args()
    begin = time.monotonic()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    lines = run_bench(options)

    free = torch.cuda.mem_get_info()[0] * 0.8 if options.device == "cuda" else 1 << 30
    pool = Pool(options.device, int(options.gib * (1 << 30) or free))
    library = FlashInfer.load(options.flashinfer, options.device)
    peers = {
        "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "varlen-flash": varlen,
        "fi-tensor": flashinfer(library, True),
        "fi-cuda": flashinfer(library, False),
        "flex": flex,
    }
    rows: list[dict[str, Any]] = []
    for shape in shapes_of(lines, options.shrink):
        if time.monotonic() - begin > options.seconds:
            print("no time left for:", shape.name)
            continue
        q = queries(shape, options.device)
        figures = {name: measure(prepare, shape, pool, q) for name, prepare in peers.items()}
        rows.append(
            {
                "case": shape.name,
                "ours_us": shape.ours["us"],
                "floor_us": shape.ours["floor_us"],
                "peers": figures,
            }
        )
        texts = (f"{n} {f['us']:.1f}" if "us" in f else f"{n} ({f['why']})" for n, f in figures.items())
        print(f"{shape.name}: ours {shape.ours['us']:.1f}; " + "; ".join(texts), flush=True)
    torch_device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "device": torch_device}
    if library is not None:
        versions["flashinfer"] = library.version
    Path(f"{options.out}.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    text = "\n".join([f"{versions}", "", *table(rows, list(peers))])
    Path(f"{options.out}.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
