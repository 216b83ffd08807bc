"""test_demo.py - the demo: tokenizer, model, and the whole of it with the real model if installed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("regex")
pytest.importorskip("threadpoolctl")

import fovea
from fovea.demo import weights as gguf_weights
from fovea.demo.__main__ import main
from fovea.demo.attention import FoveaAttention, LocalAttention
from fovea.demo.check import check_answer
from fovea.demo.generate import Sampling, generate
from fovea.demo.llama import Llama
from fovea.demo.policy import parse_layers, parse_policy
from fovea.demo.tokenizer import TextStream, Tokenizer, chat_prompt
from fovea.demo.weights import Config, LayerWeights, Weights

CONTROL, NORMAL = 3, 1


def tiny_tokenizer() -> Tokenizer:
    from fovea.demo.tokenizer import _CHAR_OF_BYTE

    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "o o", "1 2"]
    tokens = ["<end>", *_CHAR_OF_BYTE.values(), *("".join(m.split()) for m in merges)]
    return Tokenizer(tokens, [CONTROL] + [NORMAL] * (len(tokens) - 1), merges)


def tiny_model(seed: int = 0) -> Weights:
    """Random weights, 2 layers, GQA 4/2, head_dim 16."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    n_vocab, d, f = 300, 64, 96
    config = Config("tiny", 2, d, 4, 2, 16, 512, 1e-5, 10000.0, 0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5 * 2)

    layers = [
        LayerWeights(
            attn_norm=1 + matrix(d) / 10,
            qkv=matrix(8 * 16, d),
            attn_out=matrix(d, 64),
            ffn_norm=1 + matrix(d) / 10,
            gate_up=matrix(2 * f, d),
            down=matrix(d, f),
        )
        for _ in range(2)
    ]
    embedding = matrix(n_vocab, d)
    return Weights(config, tokenizer, embedding, embedding, np.ones(d, np.float32), layers)


def test_bpe_merges_by_rank():
    t = tiny_tokenizer()
    text = {i: piece for i, piece in enumerate(t._tokens)}
    assert [text[i] for i in t.encode("hello hello")] == ["hello", "Ġhello"]
    assert [text[i] for i in t.encode("hellooo")] == ["hello", "oo"]
    assert [text[i] for i in t.encode("heoo")] == ["he", "oo"]
    assert [text[i] for i in t.encode("12 3")] == ["1", "2", "Ġ", "3"]  # digits stand alone


@pytest.mark.parametrize(
    "text", ["hello", "  two  spaces\n\n\ttab", "naïve 東京 🙂", "it's 2024!", "\x00\x7f"]
)
def test_tokenizer_round_trip(text):
    t = tiny_tokenizer()
    assert t.decode(t.encode(text)) == text


def test_special_tokens():
    t = tiny_tokenizer()
    ids = t.encode("hello<end>hello")
    assert ids.count(0) == 1 and len(ids) == 3
    assert 0 not in t.encode("hello<end>", allow_special=False)
    assert t.decode(ids) == "hellohello"


def test_text_comes_in_whole_characters():
    t = tiny_tokenizer()
    stream = TextStream(t)
    pieces = [stream.push(token) for token in t.encode("a🙂b")]
    assert pieces == ["a", "", "", "", "🙂", "b"]
    assert stream.push(t.encode("é")[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_chunked_prefill_changes_nothing():
    weights = tiny_model()
    model, prompt = Llama(weights), list(range(5, 60))
    answers = [
        generate(model, LocalAttention(weights.config, 100), prompt, -1, Sampling(20, prefill_chunk=chunk))
        for chunk in (512, 7, 1)
    ]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_rope_turns_pairs_by_position():
    """Scores depend on the distance only."""
    weights = tiny_model()
    model = Llama(weights)
    from fovea.demo.llama import _rotate

    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(i: int, j: int) -> float:
        a, b = _rotate(q[None, 0], model._rope(i, 1)), _rotate(k[None, 0], model._rope(j, 1))
        return float((a * b).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-4)
    assert score(10, 3) != pytest.approx(score(10, 4), abs=1e-4)


@pytest.mark.parametrize("n_prompt", [1, 40, 150])
def test_served_attention_gives_the_same_tokens(client, n_prompt):
    import fovea

    weights = tiny_model(n_prompt)
    spec = fovea.ModelSpec("tiny demo", 2, 4, 2, 16, kv_dtype="f32")
    served = FoveaAttention(client, client.register_model(spec), 0)
    prompt = [int(t) for t in np.random.default_rng(n_prompt).integers(0, 300, n_prompt)]
    sampling = Sampling(30)
    answer = generate(Llama(weights), served, prompt, -1, sampling, keep_logits=True)
    ok, verdict = check_answer(Llama(weights), _without_eos(weights), prompt, sampling, answer)
    assert ok, verdict
    assert served.times.n_calls == 2 * 30
    served.close()


def test_check_finds_a_difference(client):
    """--check fails when the served attention is not the model's: here, its scale is off."""
    import fovea

    weights = _without_eos(tiny_model(1))
    spec = fovea.ModelSpec("wrong scale", 2, 4, 2, 16, kv_dtype="f32", softmax_scale=0.05)
    served = FoveaAttention(client, client.register_model(spec), 0)
    prompt, sampling = list(range(50)), Sampling(30)
    answer = generate(Llama(weights), served, prompt, -1, sampling, keep_logits=True)
    ok, verdict = check_answer(Llama(weights), weights, prompt, sampling, answer)
    assert not ok
    assert "DIFFERENT" in verdict


def _without_eos(weights: Weights) -> Weights:
    from dataclasses import replace

    return replace(weights, config=replace(weights.config, eos=-1))


@pytest.fixture(scope="module")
def real_weights():
    pytest.importorskip("gguf")
    try:
        return gguf_weights.load(gguf_weights.default_path())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_real_tokenizer(real_weights):
    """Golden ids, as Hugging Face's tokenizer of the same model gives them."""
    t = real_weights.tokenizer
    assert t.encode("Hello world") == [19556, 905]
    assert t.encode("What is 1234?") == [1780, 314, 216, 33, 34, 35, 36, 47]
    assert t.encode(chat_prompt("Hi", "S"))[:4] == [1, 9690, 198, 67]
    for text in ("it's  a\n\n test\t🙂", "naïve café 東京 2024", "    indented = [1, 2]"):
        assert t.decode(t.encode(text)) == text


def test_the_whole_demo(service, real_weights, capsys):
    """Two frontends at once, checked."""
    arguments = ["--address", service.address, "--check", "--max-tokens", "8", "--frontends", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "every token id is identical" in printed
    assert "tokens/s" in printed and "rank 0" in printed


def test_policy_texts():
    policy = parse_policy("s2:block=16,local=4,stride=4,offset=-1,dense=1,per=q@odd", 6)
    assert policy.policy == fovea.S2(16, 4, 4, 0, -1, 1, False, "q_head")
    assert policy.layers == [1, 3, 5]
    assert parse_policy("s2:s2-16", 3) == fovea.LayerPolicy(fovea.S2(preset="s2-16"), [0, 1, 2])
    assert parse_policy("s2:block=64,local=1,stride=2,homo@0-4:2,5", 6).layers == [0, 2, 4, 5]
    assert parse_policy("window:256,4@0", 6) == fovea.LayerPolicy(fovea.Window(256, 4), [0])
    assert parse_layers("even", 5) == [0, 2, 4]
    for text in ("s3:x", "s2:block=x", "s2:per=v,block=1", "s2:s2-16@9", "s2:s2-16@x", "window:", "s2:wrong=1"):
        with pytest.raises(ValueError, match="--policy"):
            parse_policy(text, 6)
