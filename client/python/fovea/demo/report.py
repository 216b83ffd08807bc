"""report.py - what the demo prints."""

from __future__ import annotations

import sys
import threading

from fovea._pb import attention_pb2 as pb
from fovea.demo.attention import AttentionTimes
from fovea.demo.generate import Answer

_LINE = 96
_output = threading.Lock()


class Printer:
    """Streams text as it comes. With several frontends, whole lines with the frontend's number."""

    def __init__(self, frontend: int | None) -> None:
        self._prefix = "" if frontend is None else f"[{frontend}] "
        self._line = ""

    def prompt(self, text: str) -> None:
        shown = text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"
        self.lines(f"\n> {shown}")

    def text(self, piece: str) -> None:
        if not self._prefix:
            sys.stdout.write(piece)
            sys.stdout.flush()
            return
        self._line += piece
        while "\n" in self._line or len(self._line) > _LINE:
            at = self._line.find("\n")
            if at < 0:  # too long: break at the last space that fits
                at = self._line.rfind(" ", 0, _LINE)
                at = _LINE if at <= 0 else at
            self.lines(self._line[:at])
            self._line = self._line[at:].removeprefix("\n").removeprefix(" ")

    def end_of_text(self) -> None:
        if self._prefix:
            self.lines(self._line)
            self._line = ""
        else:
            print()

    def lines(self, text: str) -> None:
        with _output:
            for line in text.split("\n"):
                print(f"{self._prefix}{line}", flush=True)


def format_times(answer: Answer, times: AttentionTimes) -> str:
    """Rates, the share of attention, and where an attention call's time goes."""
    total = answer.prefill_s + answer.decode_s
    per_call = {name: us / max(times.n_calls, 1) for name, us in times.server_us.items()}
    waited = times.client_s * 1e6 / max(times.n_calls, 1)
    return "\n".join(
        [
            f"-- {answer.n_prompt} prompt tokens in {answer.prefill_s:.2f} s, then "
            f"{len(answer.tokens)} tokens at {answer.decode_rate:.1f} tokens/s",
            f"-- attention: {100 * times.client_s / total:.0f} % of the time, {times.n_calls} calls, "
            f"{waited:.0f} us each (in the service {per_call['total']:.0f}: "
            f"queue {per_call['queue']:.0f}, compute {per_call['compute']:.0f}, "
            f"exchange {per_call['exchange']:.0f})",
        ]
    )


def format_status(status: pb.ClusterStatus) -> str:
    lines = [f"fovea {status.version}: {len(status.ranks)} rank(s), exchange {status.exchange or 'none'}"]
    for rank in status.ranks:
        lines.append(
            f"  rank {rank.rank}: {rank.backend}, {rank.device}, {rank.threads} threads, "
            f"{rank.kv_bytes_free / 2**20:.0f} of {rank.kv_bytes_total / 2**20:.0f} MiB KV free"
        )
    return "\n".join(lines)


def format_total(answers: list[Answer], status: pb.ClusterStatus) -> str:
    n_tokens = sum(len(answer.tokens) for answer in answers)
    return (
        f"\n{len(answers)} answers, {n_tokens} tokens; the service has done {status.n_requests_done} "
        f"attention requests in {status.n_steps} steps, {status.n_sessions} sessions open"
    )
