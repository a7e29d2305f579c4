"""The decoder against transformers: random tiny models of every family, built here, saved, loaded by grpo.py.

Also what a folder may get wrong (one clear line each), the cache (per-row lengths, cuts, row selection), packing, and
the export. A real model is tried if the environment variable SMOLLM2 names a folder made by tests/smollm2.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

V = 67  # vocabulary
THETA = 500.0  # rope base, far from every default
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
CASES = {  # name: family and what differs from 4 heads of 8 on 2 keys, an untied head, one file
    "llama": ("llama", {}),
    "llama-mha-sharded": ("llama", {"num_key_value_heads": 4, "max_shard_size": "10KB"}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "qwen2-sharded": ("qwen2", {"max_shard_size": "10KB"}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-sharded": ("qwen3", {"head_dim": 16, "max_shard_size": "10KB"}),
    "qwen3-tied": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-tied-sharded": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "max_shard_size": "10KB"}),
}


def build(folder, family, max_shard_size="1GB", dtype=torch.float32, **changes):
    """A random model by transformers, saved in `folder`; every weight is random, biases and norms as well."""
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"rms_norm_eps": 1e-3, "tie_word_embeddings": False, "head_dim": 8}  # eps large enough to matter
    sizes |= {"rope_theta": THETA, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | changes
    if family == "qwen2":
        del sizes["head_dim"]  # not one of its settings
    torch.manual_seed(len(folder.name))
    reference = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.25)
    reference.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return reference.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(model of ours, model of transformers, folder) of one case."""
    folder = tmp_path_factory.mktemp(request.param)
    family, changes = CASES[request.param]
    reference = build(folder, family, **changes)
    return grpo.load_model(folder), reference, folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders to copy and damage: untied, tied, sharded."""
    found = {}
    for name in ("llama", "llama-mqa-tied", "qwen2-sharded", "qwen3-tied"):
        found[name] = tmp_path_factory.mktemp("source-" + name)
        family, changes = CASES[name]
        build(found[name], family, **changes)
    return found


@pytest.fixture
def copy_of(sources, tmp_path):
    return lambda name: Path(shutil.copytree(sources[name], tmp_path / "model"))


def random_tokens(rows, length, seed=0):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, *parts):
    """load_model refuses with one line that holds these parts."""
    with pytest.raises(grpo.BadInput) as caught:
        grpo.load_model(folder)
    message = str(caught.value)
    assert message and "\n" not in message.strip(), message
    for part in parts:
        assert str(part).lower() in message.lower(), f"{part!r} is not in {message!r}"


def reference_greedy(reference, prompt, count):
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    tokens = torch.tensor([prompt])
    return reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()


def greedy(model, prompts, count):
    return grpo.generate(model, prompts, torch.zeros(len(prompts), count), temperature=0.0)


@torch.no_grad()
def uncached_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ------------------------------------------------------------------------------------------------- against transformers


def test_logits(pair):
    model, reference, folder = pair
    if "sharded" in folder.name:
        assert len(list(folder.glob("*.safetensors"))) > 1
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        expected = reference(tokens).logits
        hidden = model(tokens)
    assert expected.std() > 0.5  # otherwise agreement says little
    assert hidden.shape == (3, 40, 32) and model.logits(hidden).shape == (3, 40, V)
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-4, rtol=0)


def test_greedy_cached_and_uncached(pair):
    model, reference, _ = pair
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 12)]
    expected = [reference_greedy(reference, prompt, 24) for prompt in prompts]
    assert [uncached_greedy(model, prompt, 24) for prompt in prompts] == expected
    sampled = greedy(model, prompts, 24)  # three lengths in one batch
    assert sampled.tokens.tolist() == expected
    assert sampled.lengths.tolist() == [24] * 3 and not sampled.finished.any()


def test_gradients(pair):
    model, reference, _ = pair
    tokens = random_tokens(2, 12)
    for weights, logits in ((model, model.logits(model(tokens))), (reference, reference(tokens).logits)):
        weights.zero_grad()
        logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean().backward()
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()  # a tied head counts once
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].grad, weight.grad, atol=1e-5, rtol=1e-3, msg=name)
    model.zero_grad()


def test_loaded_state(pair):
    model, reference, _ = pair
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    tied = reference.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model["embed_tokens"].weight) == tied
    assert model.eos_ids == [] and model.vocab_bias is None


def test_export(pair, tmp_path):
    model, reference, _ = pair
    with torch.no_grad():
        weight = model.lm_head.weight
        old = weight.clone()
        weight.mul_(1.5)  # as if trained
        grpo.save_model(model, tmp_path)
        tokens = random_tokens(2, 20)
        ours = model.logits(model(tokens))
        exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        again = grpo.load_model(tmp_path)
        weight.copy_(old)
        torch.testing.assert_close(exported(tokens).logits, ours, atol=1e-4, rtol=0)
        assert torch.equal(again.logits(again(tokens)), ours)
    assert type(exported) is type(reference)
    theirs = exported.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == THETA and config["rope_parameters"]["rope_theta"] == THETA  # old and new readers
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert ("lm_head.weight" in file.keys()) != reference.config.tie_word_embeddings  # noqa: SIM118
        assert all(name.startswith(("model.", "lm_head.")) for name in file.keys())  # noqa: SIM118
    if os.name == "posix":
        (tmp_path / "plain").touch()
        modes = [(tmp_path / name).stat().st_mode for name in ("plain", "model.safetensors", "config.json")]
        assert len(set(modes)) == 1  # readable for whom the umask allows


ROPE_SPELLINGS = {
    "theta": {"rope_theta": THETA},
    "parameters": {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}},
    "scaling-null": {"rope_theta": THETA, "rope_scaling": None},
    "scaling-default": {"rope_theta": THETA, "rope_scaling": {"rope_type": "default"}},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
@pytest.mark.parametrize("source", ["llama", "qwen2-sharded", "qwen3-tied"])
def test_rope_spellings(copy_of, source, spelling, tmp_path):
    folder, tokens = copy_of(source), random_tokens(2, 30)
    expected = grpo.load_model(folder)
    edit_config(folder, remove=("rope_theta", "rope_parameters", "rope_scaling"), **ROPE_SPELLINGS[spelling])
    model = grpo.load_model(folder)
    with torch.no_grad():
        ours = model.lm_head(model(tokens))
        assert torch.equal(ours, expected.lm_head(expected(tokens)))
        edit_config(folder, rope_theta=THETA * 10, rope_parameters={"rope_theta": THETA * 10, "rope_type": "default"})
        other = grpo.load_model(folder)
        assert (other.lm_head(other(tokens)) - ours).abs().max() > 0.01  # so a wrong base would show
        grpo.save_model(model, tmp_path / "export")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
        torch.testing.assert_close(exported(tokens).logits, ours, atol=1e-4, rtol=0)


def test_bfloat16_is_widened(tmp_path):
    build(tmp_path, "qwen2", dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, tokens = grpo.load_model(tmp_path), random_tokens(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), reference(tokens).logits, atol=1e-4, rtol=0)
    grpo.save_model(model, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "float32"  # no rounding


def test_settings_that_may_be_absent(tmp_path):
    """As transformers reads them: as many key heads as heads, eps 1e-6, hidden_size / heads, an untied head."""
    build(tmp_path, "llama", num_key_value_heads=4, rms_norm_eps=1e-6)
    absent = ("num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings", "hidden_act", "eos_token_id")
    edit_config(tmp_path, remove=absent + ("attention_bias", "mlp_bias", "max_position_embeddings"))
    model, tokens = grpo.load_model(tmp_path), random_tokens(2, 30)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), reference(tokens).logits, atol=1e-4, rtol=0)


def test_tied_head_that_is_stored_too(copy_of):
    folder = copy_of("llama-mqa-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = grpo.load_model(folder)
    assert model.lm_head.weight is model.model["embed_tokens"].weight


# ------------------------------------------------------------------------------------------------- cache, rows, packing


@pytest.fixture(scope="module", params=["llama-mqa-tied", "qwen3-tied"])
def exact(request, sources):
    """A model in float64, where two ways to one number agree to 1e-9."""
    return grpo.load_model(sources[request.param]).double().requires_grad_(False)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (2, 9, 5, 1)]


def test_prefill_gives_the_last_hidden_state_of_each_row(exact):
    cache, hidden = grpo.prefill(exact, PROMPTS, 20)
    assert hidden.shape == (4, 32) and cache.lengths.tolist() == [2, 9, 5, 1]
    for row, prompt in enumerate(PROMPTS):
        close(hidden[row], exact(torch.tensor([prompt]))[0, -1])


def test_appending_at_different_offsets(exact):
    cache, _ = grpo.prefill(exact, PROMPTS, 20)
    cache.width = 20
    added = random_tokens(4, 11, seed=1)
    hidden = torch.cat([exact(part, cache=cache) for part in added.split((4, 1, 6), dim=1)], dim=1)  # (4, 11, C)
    assert cache.lengths.tolist() == [13, 20, 16, 12]  # one row is full
    for row, prompt in enumerate(PROMPTS):
        whole = torch.cat([torch.tensor(prompt), added[row]])[None]
        close(hidden[row], exact(whole)[0, -11:])


def test_narrow_width_reads_the_same(exact):
    wide, narrow = (grpo.prefill(exact, PROMPTS, 20)[0] for _ in range(2))
    wide.width, narrow.width = 20, 12  # 9 + 3 positions are in use
    added = random_tokens(4, 3, seed=2)
    close(exact(added, cache=narrow), exact(added, cache=wide))


def test_cut_row_goes_on_like_a_fresh_one(exact):
    cache, _ = grpo.prefill(exact, PROMPTS, 20)
    cache.width = 20
    exact(random_tokens(4, 6, seed=3), cache=cache)
    kept = torch.tensor([5, 3, 11, 0])  # inside the added part, inside the prompt, nothing cut, everything cut
    cut = [torch.cat([torch.tensor(p), random_tokens(4, 6, seed=3)[r]])[: kept[r]] for r, p in enumerate(PROMPTS)]
    cache.lengths.copy_(kept)
    added = random_tokens(4, 5, seed=4)
    hidden = torch.cat([exact(added[:, :2], cache=cache), exact(added[:, 2:], cache=cache)], dim=1)
    assert cache.lengths.tolist() == (kept + 5).tolist()
    for row in range(4):
        close(hidden[row], exact(torch.cat([cut[row], added[row]])[None])[0, -5:])


def test_select_rows_with_repeats(exact):
    cache, _ = grpo.prefill(exact, PROMPTS, 20)
    cache.width = 20
    rows = [2, 0, 0, 1, 2]
    cache.select(torch.tensor(rows))
    assert cache.lengths.tolist() == [len(PROMPTS[r]) for r in rows]
    added = random_tokens(5, 4, seed=5)  # repeats of a row go different ways
    hidden = exact(added, cache=cache)
    cache.select(torch.tensor([4, 1]))
    more = random_tokens(2, 1, seed=6)
    last = exact(more, cache=cache)
    for row, r in enumerate(rows):
        close(hidden[row], exact(torch.cat([torch.tensor(PROMPTS[r]), added[row]])[None])[0, -4:])
    for row, r in enumerate([4, 1]):
        whole = torch.cat([torch.tensor(PROMPTS[rows[r]]), added[r], more[row]])
        close(last[row], exact(whole[None])[0, -1:])


def test_embeddings_as_input(exact):
    tokens = random_tokens(3, 8)
    embeddings = exact.state_dict()["model.embed_tokens.weight"][tokens]
    close(exact(embeddings), exact(tokens))
    caches = [grpo.prefill(exact, PROMPTS[:3], 20)[0] for _ in range(2)]
    close(exact(embeddings, cache=caches[0]), exact(tokens, cache=caches[1]))


def test_positions_are_per_row(exact):
    tokens = random_tokens(2, 8)
    shifted = exact(tokens, positions=torch.arange(8) + torch.tensor([[0], [5]]))
    close(shifted[0], exact(tokens)[0])
    # rotary positions are relative: a common shift changes nothing (angles are float32, hence the tolerance)
    torch.testing.assert_close(shifted[1], exact(tokens)[1], atol=1e-5, rtol=0)
    stretched = exact(tokens, positions=torch.arange(8)[None] * torch.tensor([[1], [2]]))
    close(stretched[0], exact(tokens)[0])
    assert (stretched[1] - exact(tokens)[1]).abs().max() > 1e-3


def test_packing_equals_separate_sequences(exact):
    lengths = (4, 7, 2)
    tokens = random_tokens(2, sum(lengths), seed=7)
    part = torch.arange(3).repeat_interleave(torch.tensor(lengths))  # (T,) number of the sequence
    positions = torch.cat([torch.arange(n) for n in lengths])[None]  # (1, T)
    causal = torch.ones(len(part), len(part), dtype=torch.bool).tril()
    packed = exact(tokens, positions=positions, mask=(causal & (part[:, None] == part))[None, None])
    separate = torch.cat([exact(t) for t in tokens.split(lengths, dim=1)], dim=1)
    close(packed, separate)
    assert (exact(tokens, positions=positions) - separate).abs().max() > 1e-3  # without the mask they mix


def test_mask_per_row(exact):
    tokens = random_tokens(2, 6, seed=8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = causal & (torch.arange(6) != 0) | torch.eye(6, dtype=torch.bool)  # token 0 is seen by itself alone
    out = exact(tokens, mask=torch.stack([causal, hidden])[:, None])
    close(out[0], exact(tokens)[0])
    close(out[1, 1:], exact(tokens[1:, 1:], positions=torch.arange(1, 6)[None])[0])


# ----------------------------------------------------------------------------------------------- folders that are wrong


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensor(copy_of):
    folder = copy_of("llama")
    edit_tensors(folder, lambda t: t.pop(NAME))
    refused(folder, "1 tensor", "missing", NAME)


def test_missing_head(copy_of):
    folder = copy_of("llama")
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))  # config.json says it is not tied
    refused(folder, "missing", "lm_head.weight")


def test_missing_layer(copy_of):
    folder = copy_of("llama")
    edit_config(folder, num_hidden_layers=3)
    refused(folder, "9 tensors", "missing", "model.layers.2.")


def test_extra_tensor(copy_of):
    folder = copy_of("llama")
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(folder, "1 tensor", "model.layers.0.self_attn.q_proj.bias")


def test_misshaped_tensor(copy_of):
    folder = copy_of("llama")
    edit_tensors(folder, lambda t: t.update({NAME: t[NAME][:-1].clone()}))
    refused(folder, "shape", NAME)


def test_tied_but_different(copy_of):
    folder = copy_of("llama-mqa-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(folder, "tie", "lm_head")


def test_tied_without_embedding(copy_of):
    folder = copy_of("llama-mqa-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    refused(folder, "embed_tokens")


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_damaged_file(copy_of, size):
    folder = copy_of("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "model.safetensors", "damaged")


def test_garbage_file(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").write_bytes(b"\xff" * 4000)
    refused(folder, "model.safetensors", "damaged")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"


def test_lfs_pointer(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").write_text(POINTER)
    refused(folder, "model.safetensors", len(POINTER), "git lfs pull")


def test_lfs_pointer_among_shards(copy_of):
    folder = copy_of("qwen2-sharded")
    path = sorted(folder.glob("model-0*.safetensors"))[1]
    path.write_text(POINTER)
    refused(folder, path.name, "git lfs pull")


def test_missing_shard(copy_of):
    folder = copy_of("qwen2-sharded")
    path = sorted(folder.glob("model-0*.safetensors"))[1]
    path.unlink()
    refused(folder, path.name, "no ")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_index(copy_of, text):
    folder = copy_of("qwen2-sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, folder)


def test_no_weights(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, folder, "safetensors")


def test_no_config(copy_of, tmp_path):
    folder = copy_of("llama")
    (folder / "config.json").unlink()
    refused(folder, "config.json", folder)
    refused(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize("text", ["{", "", "[]", POINTER])
def test_damaged_config(copy_of, text):
    folder = copy_of("llama")
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


UNSUPPORTED = {
    "model_type": ({"model_type": "gemma3"}, ("gemma3", "llama", "qwen2", "qwen3")),
    "hidden_act": ({"hidden_act": "gelu_new"}, ("hidden_act", "gelu_new", "silu")),
    "rope-new": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}}, ("rope", "yarn", "default")),
    "rope-old": (
        {"rope_parameters": None, "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ("rope", "linear", "default"),
    ),
    "rope-llama3": (
        {"rope_parameters": None, "rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ("rope", "llama3", "default"),
    ),
    "rope-none": ({"rope_parameters": None, "rope_theta": None}, ("rope_theta",)),
    "attention_bias": ({"attention_bias": True}, ("attention", "bias")),
    "mlp_bias": ({"mlp_bias": True}, ("mlp", "bias")),
    "size": ({"hidden_size": "32"}, ("hidden_size", "32")),
    "size-null": ({"num_hidden_layers": None}, ("num_hidden_layers",)),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_setting(copy_of, case):
    folder, (changes, parts) = copy_of("llama"), UNSUPPORTED[case]
    edit_config(folder, remove=("rope_theta",), **changes)
    refused(folder, *parts)


def test_sliding_window(copy_of):
    folder = copy_of("qwen2-sharded")
    edit_config(folder, use_sliding_window=True, sliding_window=16)
    refused(folder, "sliding")


def save_tokenizer(folder, size, eos=None):
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos} if eos else {}))


def test_tokenizer_longer_than_the_embedding(copy_of):
    folder = copy_of("llama")
    save_tokenizer(folder, V + 1)
    refused(folder, "tokenizer", V)


def test_special_ids(copy_of):
    """EOS ids of config, generation config and tokenizer; ids beyond the tokenizer are never to be sampled."""
    folder = copy_of("llama")
    save_tokenizer(folder, V - 4, eos="w9")
    edit_config(folder, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5], "suppress_tokens": [3]}))
    model = grpo.load_model(folder)
    assert sorted(model.eos_ids) == [5, 7, 9]
    assert model.vocab_bias.shape == (V,)
    assert (model.vocab_bias == -torch.inf).nonzero()[:, 0].tolist() == [3, V - 4, V - 3, V - 2, V - 1]
    assert (model.vocab_bias.isfinite() == (model.vocab_bias == 0)).all()
    grpo.save_model(model, folder / "export")  # the tokenizer's files come along
    again = grpo.load_model(folder / "export")
    assert again.eos_ids == model.eos_ids and torch.equal(again.vocab_bias, model.vocab_bias)
    assert grpo.load_tokenizer(folder / "export").token_to_id("w9") == 9


def test_save_over_the_own_folder(copy_of):
    """A model saved where it came from stays whole, its tokenizer too."""
    folder = copy_of("llama")
    save_tokenizer(folder, V)
    model = grpo.load_model(folder)
    grpo.save_model(model, folder)
    again = grpo.load_model(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert grpo.load_tokenizer(folder).get_vocab_size() == V


# --------------------------------------------------------------------------------------------------------- a real model


smollm2 = pytest.mark.skipif(
    not (os.environ.get("SMOLLM2") and Path(os.environ["SMOLLM2"]).is_dir()),
    reason="no real model: python tests/smollm2.py DIR makes one, then set SMOLLM2=DIR",
)
QUESTIONS = ["The capital of France is", "def add(a, b):\n", "1 + 1 = 2\n2 + 2 = 4\n3 + 3 ="]


@pytest.fixture(scope="module")
def real():
    folder = os.environ["SMOLLM2"]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = grpo.load_model(folder), grpo.load_tokenizer(folder)
    return model, reference, [tokenizer.encode(text).ids for text in QUESTIONS]


@smollm2
def test_smollm2_logits(real):
    model, reference, prompts = real
    with torch.no_grad():
        for tokens in ([p] for p in prompts):
            ours, expected = model.lm_head(model(torch.tensor(tokens))), reference(torch.tensor(tokens)).logits
            assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
            assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@smollm2
def test_smollm2_greedy(real):
    model, reference, prompts = real
    expected = [reference_greedy(reference, prompt, 20) for prompt in prompts]
    eos, model.eos_ids = model.eos_ids, []
    try:
        assert greedy(model, prompts, 20).tokens.tolist() == expected
    finally:
        model.eos_ids = eos
    assert eos == [2] and model.vocab_bias is None


@smollm2
def test_smollm2_export(real, tmp_path):
    model, reference, prompts = real
    grpo.save_model(model, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in reference.state_dict().items())
