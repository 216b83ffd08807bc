"""flashinfer_decode.py - FlashInfer's paged decode kernels without the flashinfer package.

The package needs a dozen others and compiles its kernels at first use. flashinfer_build.sh leaves the two
libraries that it would compile; they need tvm_ffi only, which takes torch tensors as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

WORKSPACE_BYTES = 256 << 20
PLAN_BYTES = 16 << 20
LAYOUT_NHD = 0
MASK_NONE = 0


class FlashInfer:
    def __init__(self, folder: Path, device: str) -> None:
        sys.path.append(str(folder / "site"))
        import tvm_ffi

        self.version = (folder / "version").read_text().strip()
        self.tensor: Any = tvm_ffi.load_module(str(folder / "batch_prefill.so"))
        self.cuda: Any = tvm_ffi.load_module(str(folder / "batch_decode.so"))
        self.stream = tvm_ffi.use_torch_stream
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.plan_device = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        self.plan_host = torch.empty(PLAN_BYTES, dtype=torch.uint8, pin_memory=True)

    @staticmethod
    def load(folder: Path, device: str) -> FlashInfer | None:
        """None: not carried, or it does not load here (the reason is printed)."""
        if not folder.is_dir() or device != "cuda":
            return None
        try:
            return FlashInfer(folder, device)
        except Exception as error:  # noqa: BLE001 - the other peers go on
            print(f"FlashInfer does not load: {type(error).__name__}: {error}")
            return None

    def plan(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Sequence[int],
        page: int,
        tables: Sequence[torch.Tensor],
        scale: float,
        use_tensor_cores: bool,
    ) -> list[Callable[[], torch.Tensor]]:
        """One call for each page table; all share the plan, which depends on the lengths alone.

        q [B, Hq, d]; k, v [pages, page, Hkv, d]; a table lists the pages of all items, one after another.
        """
        batch, q_heads, dim = q.shape
        kv_heads = k.shape[2]
        counts = torch.tensor([-(-n // page) for n in lengths])
        begins = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32)
        last = torch.tensor([(n - 1) % page + 1 for n in lengths], dtype=torch.int32, device=q.device)
        begins_q = torch.arange(batch + 1, dtype=torch.int32)
        buffers = (self.workspace, self.plan_device, self.plan_host)
        with self.stream():
            if use_tensor_cores:
                host_lengths = torch.tensor(lengths, dtype=torch.int32)
                sizes = (batch, batch, q_heads, kv_heads, page, False, dim, dim, False, -1, -1, False, 0, 0)
                plan = self.tensor.plan(*buffers, begins_q, begins, host_lengths, *sizes)
            else:
                empty = q.new_empty(0)
                sizes = (batch, q_heads, kv_heads, page, False, -1, 0.0, dim, dim)
                plan = self.cuda.plan(*buffers, begins, *sizes, empty, empty)
        torch.cuda.synchronize()
        on_device = begins.to(q.device), begins_q.to(q.device)
        return [
            self._call(plan, q, k, v, on_device, table, last, scale, use_tensor_cores) for table in tables
        ]

    def _call(
        self,
        plan: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        begins: tuple[torch.Tensor, torch.Tensor],
        table: torch.Tensor,
        last: torch.Tensor,
        scale: float,
        use_tensor_cores: bool,
    ) -> Callable[[], torch.Tensor]:
        out = torch.full_like(q, float("nan"))
        begins_kv, begins_q = begins
        common = (self.workspace, self.plan_device, plan, q, k, v)

        def tensor_cores() -> torch.Tensor:
            with self.stream():
                self.tensor.paged_run(
                    *common, begins_q, begins_kv, table, last, out, None, MASK_NONE, LAYOUT_NHD, -1, False,
                    None, None, None, None, None, None, None, None, 0.0, scale, 1.0, 1e-4, 0,
                )  # fmt: skip
            return out

        def cuda_cores() -> torch.Tensor:
            with self.stream():
                self.cuda.run(
                    *common,
                    begins_kv,
                    table,
                    last,
                    out,
                    None,
                    LAYOUT_NHD,
                    -1,
                    False,
                    None,
                    0.0,
                    scale,
                    1.0,
                    1e-4,
                )
            return out

        return tensor_cores if use_tensor_cores else cuda_cores
