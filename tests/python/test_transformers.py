"""test_transformers.py - Hugging Face models generate the same tokens as with sdpa."""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fovea  # noqa: E402
import fovea.transformers as bridge  # noqa: E402

torch.set_num_threads(1)  # its threads spin, and the service needs the other cores

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral window": (transformers.MistralConfig, {"sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma2 window, softcap": (
        transformers.Gemma2Config,
        {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 20},
    ),
}


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
LATENT_FAMILIES = {
    "deepseek v2": (transformers.DeepseekV2Config, {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek v3": (transformers.DeepseekV3Config, LATENT),
}


ALL = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.fovead) for name in LATENT_FAMILIES)]


def make(family: str):
    config, extra = {**FAMILIES, **LATENT_FAMILIES}[family]
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim" or "kv_lora_rank" not in extra}
    model = transformers.AutoModelForCausalLM.from_config(config(**{**sizes, **extra})).eval()
    return model


@pytest.fixture(scope="module", autouse=True)
def registered(shared_service):
    client = bridge.register(shared_service.address)
    yield client
    gc.collect()
    client.close()


@pytest.fixture
def batch():
    """Two rows, the first padded on the left."""
    ids = torch.randint(1, 500, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, **kwargs):
    """generate() with local attention and with fovea."""
    local = "eager" if model.config.model_type == "gemma2" else "sdpa"  # gemma2: sdpa has no softcap
    results = []
    for name in (local, "fovea"):
        model.set_attn_implementation(name)
        results.append(model.generate(max_new_tokens=20, do_sample=False, **kwargs))
    return results


@pytest.mark.parametrize("family", ALL)
def test_one_sequence(client, family):
    ids = torch.randint(1, 500, (1, 13), generator=torch.Generator().manual_seed(2))
    ours, theirs = both(make(family), input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ALL)
def test_batch_with_left_padding(client, batch, family):
    ours, theirs = both(make(family), **batch)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search(client, batch, options):
    ours, theirs = both(make("llama"), **batch, **options)
    assert torch.equal(ours, theirs)


def test_sessions_are_closed_after_generate(client, batch):
    before = client.status().n_sessions
    both(make("llama"), **batch, num_beams=3)
    gc.collect()
    assert client.status().n_sessions == before


def test_assisted_generation(client):
    """Speculation: rejected tokens are cropped, that is truncated in the service."""
    model, assistant = make("llama"), make("qwen2")
    ids = torch.randint(1, 500, (1, 9), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    model.set_attn_implementation("fovea")
    given = model.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(expected, given)


def test_cache_across_calls(client, batch):
    """A cache that the caller holds: two forward calls, a crop, another token; logits like sdpa's."""
    model = make("llama")
    ids = batch["input_ids"][1:]

    def run(cache):
        with torch.no_grad():
            first = model(ids[:, :6], past_key_values=cache, use_cache=True).logits
            second = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
            cache.crop(-3)
            third = model(ids[:, 8:10], past_key_values=cache, use_cache=True).logits
        return torch.cat([first, second, third], dim=1)

    model.set_attn_implementation("sdpa")
    expected = run(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("fovea")
    with bridge.FoveaCache(model.config) as cache:
        given = run(cache)
        assert cache.get_seq_length() == 10
        assert list(cache.sessions[0].info().layer_tokens) == [10] * 3
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 0


def test_batch_rows_can_be_selected_and_repeated(client, batch):
    model = make("llama")
    ids = batch["input_ids"]

    def run(cache):
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
            cache.batch_select_indices(torch.tensor([0, 1, 3]))
            rows = torch.stack([ids[1], ids[0], ids[1]])
            return model(rows[:, 8:], past_key_values=cache, use_cache=True).logits

    model.set_attn_implementation("sdpa")
    expected = run(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("fovea")
    with bridge.FoveaCache(model.config) as cache:
        torch.testing.assert_close(run(cache), expected, rtol=1e-4, atol=1e-4)
        assert len(cache.sessions) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(client, batch, dtype):
    model = make("llama").to(dtype)
    logits = []
    for name in ("sdpa", "fovea"):
        model.set_attn_implementation(name)
        cache = bridge.FoveaCache(model.config) if name == "fovea" else None
        with torch.no_grad():
            logits.append(model(batch["input_ids"][1:], past_key_values=cache).logits.float())
        if cache is not None:
            assert cache.spec.kv_dtype == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
            cache.close()
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert error < 0.05


def test_what_can_not_be_served_is_refused(client, batch):
    model = make("llama")
    model.set_attn_implementation("fovea")
    ids = batch["input_ids"]
    with torch.no_grad(), pytest.raises(ValueError, match="FoveaCache"):
        model(ids, use_cache=False)
    with bridge.FoveaCache(model.config) as cache, pytest.raises(NotImplementedError, match="no_grad"):
        model(ids, past_key_values=cache)
    mask = torch.zeros(2, 1, 11, 11)
    with torch.no_grad(), bridge.FoveaCache(model.config) as cache:
        with pytest.raises(NotImplementedError, match="mask"):
            model(ids, attention_mask=mask, past_key_values=cache)
    config = transformers.Llama4TextConfig(num_hidden_layers=4)
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        bridge.FoveaCache(config)


def test_a_mask_that_changes_is_refused(client, batch):
    model = make("llama")
    model.set_attn_implementation("fovea")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad(), bridge.FoveaCache(model.config) as cache:
        model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        changed = mask.clone()
        changed[1, 2] = 0
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, 8:], attention_mask=changed, past_key_values=cache)


def test_a_service_that_refuses(client, batch):
    """The service's error comes out of generate() as it is."""
    model = make("llama")
    model.set_attn_implementation("fovea")
    cache = bridge.FoveaCache(model.config)
    with torch.no_grad():
        model(batch["input_ids"], past_key_values=cache)
        for session in cache.sessions:
            session.close()
        with pytest.raises(fovea.NotFound):
            model(batch["input_ids"], past_key_values=cache)


def test_a_real_model(client):
    """SmolLM2-135M, loaded by transformers from the GGUF file that the demo uses."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from fovea.demo.weights import default_path

    try:
        path = default_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt")
    answers = []
    for name in ("sdpa", "fovea"):
        model.set_attn_implementation(name)
        ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    assert "Paris" in answers[1]
    assert answers[0] == answers[1]


@pytest.mark.fovead
@pytest.mark.parametrize("groups", [0, 2])
def test_latents_are_stored_as_such(client, batch, groups):
    """One latent and one RoPE key a token; in slices, where there are ranks, it runs and says what it is."""
    if groups > len(client.status().ranks):
        pytest.skip(f"needs {groups} ranks")
    model = make("deepseek v3")
    model.set_attn_implementation("fovea")
    sharding = fovea.Sharding("latent", groups=groups) if groups else None
    with bridge.FoveaCache(model.config, sharding=sharding) as cache:
        out = model.generate(**batch, max_new_tokens=5, do_sample=False, past_key_values=cache)
        assert out.shape == (2, 16)
        assert (cache.spec.kind, cache.spec.latent_dim, cache.spec.rope_dim) == ("latent", 64, 16)
        assert cache.sessions[1].placement().approximate == bool(groups)
        assert cache.sessions[1].info().max_tokens == 15
