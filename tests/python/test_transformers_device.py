"""test_transformers_device.py - Llama-shaped models on the CPU or a GPU generate the tokens that sdpa gives.

FV_TEST_DEVICE=cuda: the model runs there (default: where torch has a GPU; FV_TEST_DEVICE=cpu: not even then).
The models are fp32 with random weights, so a wrong attention shows in the tokens at once; the scores of every
step are compared besides, so that a token that happens to be right hides nothing.
"""

from __future__ import annotations

import gc
import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fovea  # noqa: E402
import fovea.transformers as bridge  # noqa: E402

pytestmark = pytest.mark.fovead  # the model of the service takes minutes

DEVICE = os.environ.get("FV_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
N_NEW = 64
SEED = int(os.environ.get("FV_SEED", "20"))
# of the largest score of a step; fp32 sums in another order through all layers (seen: 4e-6)
TOLERANCE = 1e-4

MODELS = {  # head_dim, query heads, KV heads, layers
    "d64 16/4": (64, 16, 4, 8),
    "d128 8/2": (128, 8, 2, 6),
    "d80 4/4": (80, 4, 4, 4),
}

torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # its threads spin; the service needs cores too
torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is meant here
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    head_dim, n_q_heads, n_kv_heads, n_layers = MODELS[request.param]
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=n_layers,
        num_attention_heads=n_q_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.06,  # attention neither flat nor one-hot
        eos_token_id=None,
        pad_token_id=0,
    )
    yield transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def registered(shared_service):
    with bridge.register(shared_service.address) as client:
        yield client
        gc.collect()


def prompts(lengths):
    """Rows of these lengths, padded on the left."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(SEED + longest)
    ids = torch.randint(1, 1000, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model, attention, inputs, **kwargs):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=N_NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **kwargs,
        )


def check_same(expected, given, n_prompt):
    assert given.sequences.device == expected.sequences.device
    worst = 0.0
    for step, (want, got) in enumerate(zip(expected.scores, given.scores, strict=True)):
        assert got.dtype == torch.float32 and torch.isfinite(got).all()
        worst = max(worst, ((want - got).abs().max() / want.abs().max()).item())
        tokens = expected.sequences[:, n_prompt + step], given.sequences[:, n_prompt + step]
        top = want.topk(2).values
        gap = ((top[:, 0] - top[:, 1]) / want.abs().max()).min().item()
        assert torch.equal(*tokens), (
            f"token {step}: expected {tokens[0].tolist()}, given {tokens[1].tolist()}; the first two scores "
            f"are {gap:.1e} apart, the largest difference so far is {worst:.1e} (of the largest score)"
        )
    assert worst < TOLERANCE
    return worst


LENGTHS = [[1], [17], [64], [333], [1100], [40, 7, 129]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_same_tokens(model, client, lengths, capsys):
    inputs = prompts(lengths)
    expected = generate(model, "sdpa", inputs)
    given = generate(model, "fovea", inputs)
    worst = check_same(expected, given, max(lengths))
    assert len({tuple(row) for row in expected.sequences[:, -N_NEW:].tolist()}) == len(lengths)
    with capsys.disabled():
        print(f" {DEVICE} {len(lengths)}x{max(lengths)}+{N_NEW}: {worst:.1e}", end="")


@pytest.mark.parametrize("mode", ["heads", "context"])
def test_same_tokens_when_sharded(model, client, mode):
    """On one rank the same as unsharded; with more, several hold a part of the session."""
    inputs = prompts([40, 7, 129])
    expected = generate(model, "sdpa", inputs)
    sharding = fovea.Sharding(mode, shard_tokens=64)
    with bridge.FoveaCache(model.config, sharding=sharding) as cache:
        given = generate(model, "fovea", inputs, past_key_values=cache)
        check_same(expected, given, 129)
        holding = {share.rank for share in cache.sessions[2].placement().shares if share.n_tokens}
        assert (len(holding) > 1) == (len(client.status().ranks) > 1)
