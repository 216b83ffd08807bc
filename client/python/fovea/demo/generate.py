"""generate.py - one prompt to one answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fovea.demo.attention import Attention
from fovea.demo.llama import Llama
from fovea.demo.weights import F32


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    n_prompt: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    logits: list[F32] = field(default_factory=list)  # of every step, if they were asked for

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the decode steps (the first token belongs to the prefill)."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float = 0.0  # 0 = greedy
    seed: int = 0
    prefill_chunk: int = 512  # tokens per prefill request


def generate(
    model: Llama,
    attention: Attention,
    prompt: list[int],
    eos: int,
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda token: None,
    keep_logits: bool = False,
) -> Answer:
    """Prefill in chunks, then one token a step until eos or max_tokens."""
    answer = Answer(n_prompt=len(prompt))
    random = np.random.default_rng(sampling.seed)
    began = time.perf_counter()
    for start in range(0, len(prompt), sampling.prefill_chunk):
        chunk = prompt[start : start + sampling.prefill_chunk]
        logits = model.logits(chunk, start, attention)
    answer.prefill_s = time.perf_counter() - began
    began = time.perf_counter()
    while True:
        if keep_logits:
            answer.logits.append(logits)
        token = _pick(logits, sampling.temperature, random)
        if token == eos:
            break
        answer.tokens.append(token)
        on_token(token)
        if len(answer.tokens) == sampling.max_tokens:
            break
        logits = model.logits([token], len(prompt) + len(answer.tokens) - 1, attention)
    answer.decode_s = time.perf_counter() - began
    return answer


def _pick(logits: F32, temperature: float, random: np.random.Generator) -> int:
    if temperature <= 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))
