"""The decoder against transformers: random tiny models of every family, saved, loaded by grpo.py.

Also what a folder may get wrong (one line each), the cache (per-row lengths, cuts, row selection)
and the export. A real model is tried if the environment variable SMOLLM2 names a folder made by
tests/smollm2.py.
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

V = 67  # vocabulary
THETA = 500.0  # rope base, far from every default
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TIED, SHARDED = {"tie_word_embeddings": True}, {"max_shard_size": "10KB"}
CASES = {  # name: family, what differs from 4 heads of 8 on 2 keys, an untied head, one file
    "llama": ("llama", {}),
    "llama-mha-sharded": ("llama", {"num_key_value_heads": 4} | SHARDED),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1} | TIED),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "qwen2-sharded": ("qwen2", SHARDED),
    "qwen2-tied": ("qwen2", TIED),
    "qwen3-sharded": ("qwen3", {"head_dim": 16} | SHARDED),
    "qwen3-tied": ("qwen3", {"head_dim": 12} | TIED),
    "qwen3-tied-sharded": ("qwen3", {"head_dim": 6} | TIED | SHARDED),
}


def build(folder, family, max_shard_size="1GB", dtype=torch.float32, **changes):
    """A random model by transformers, saved in `folder`; biases and norms are random as well."""
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"rms_norm_eps": 1e-3, "head_dim": 8}  # eps large enough to matter
    sizes |= {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}
    sizes |= {"rope_theta": THETA, "tie_word_embeddings": False}
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
    """Folders to copy and damage."""
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
    config = json.loads(path.read_text())
    kept = {name: value for name, value in config.items() if name not in remove}
    path.write_text(json.dumps(kept | changes))


def theirs_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def same_logits(model, reference):
    """Within 1e-4 of transformers; returns ours."""
    tokens = random_tokens(2, 30)
    ours, expected = model.logits(model(tokens)), reference(tokens).logits
    assert ours.shape == (2, 30, V) and expected.std() > 0.5  # else agreement says little
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    return ours


def reference_greedy(reference, prompt, count, eos=None):
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": eos, "pad_token_id": 0}
    tokens = torch.tensor([prompt])
    found = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found[0, len(prompt) :].tolist()


def greedy(model, prompts, count):
    return grpo.generate(model, prompts, torch.zeros(len(prompts), count), temperature=0.0)


@torch.no_grad()
def uncached_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


# -------------------------------------------------------------------------- against transformers


def test_logits(pair):
    model, reference, folder = pair
    if "sharded" in folder.name:
        assert len(list(folder.glob("*.safetensors"))) > 1
    same_logits(model, reference)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    tied = reference.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.eos_ids == [] and model.vocab_bias is None


def test_greedy_cached_and_uncached(pair):
    model, reference, _ = pair
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 12)]
    expected = [reference_greedy(reference, prompt, 24) for prompt in prompts]
    assert [uncached_greedy(model, prompt, 24) for prompt in prompts] == expected
    sampled = greedy(model, prompts, 24)  # three lengths in one batch
    assert sampled.tokens.tolist() == expected
    assert sampled.lengths.tolist() == [24] * 3 and not sampled.finished.any()


def test_greedy_with_several_end_ids(tmp_path):
    ends = list(range(0, V, 5))
    reference = build(tmp_path, "llama", eos_token_id=ends)
    model = grpo.load_model(tmp_path)
    assert model.eos_ids == ends
    prompts = [random_tokens(1, 1 + row, seed=row)[0].tolist() for row in range(8)]
    sampled = greedy(model, prompts, 30)
    for row, prompt in enumerate(prompts):
        expected = reference_greedy(reference, prompt, 30, ends)
        assert sampled.tokens[row, : sampled.lengths[row]].tolist() == expected
        assert sampled.finished[row] == (expected[-1] in ends)
    assert sampled.finished.any() and len(set(sampled.lengths.tolist())) > 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(pair, checkpointing):
    model, reference, _ = pair
    tokens, model.checkpointing = random_tokens(2, 12), checkpointing
    for weights in (model, reference):
        weights.zero_grad()
        logits = model.logits(model(tokens)) if weights is model else reference(tokens).logits
        logprobs = logits[:, :-1].log_softmax(-1)
        logprobs.gather(-1, tokens[:, 1:, None]).mean().backward()
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()  # a tied head counts once
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].grad, weight.grad, atol=1e-5, rtol=1e-3, msg=name)
    model.zero_grad()
    model.checkpointing = False


def test_export(pair, tmp_path):
    model, reference, _ = pair
    weight = model.lm_head.weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)  # as if trained
        grpo.save_model(model, tmp_path)
        exported, again = theirs_of(tmp_path), grpo.load_model(tmp_path)
        assert torch.equal(same_logits(again, exported), same_logits(model, exported))
        weight.copy_(old)
    assert type(exported) is type(reference)
    theirs = exported.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())  # old and new readers
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert ("lm_head.weight" in names) != reference.config.tie_word_embeddings


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whom_the_umask_allows_can_read_the_export(sources, tmp_path, umask):
    before = os.umask(umask)
    try:
        grpo.save_model(grpo.load_model(sources["llama"]), tmp_path / "export")
    finally:
        os.umask(before)
    for file in (tmp_path / "export").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


ROPE_SPELLINGS = {
    "theta": {"rope_theta": THETA},
    "parameters": {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}},
    "scaling-null": {"rope_theta": THETA, "rope_scaling": None},
    "scaling-default": {"rope_theta": THETA, "rope_scaling": {"rope_type": "default"}},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
@pytest.mark.parametrize("source", ["llama", "qwen2-sharded", "qwen3-tied"])
def test_rope_spellings(copy_of, source, spelling, tmp_path):
    folder = copy_of(source)
    expected = same_logits(grpo.load_model(folder), theirs_of(folder))
    names = "rope_theta", "rope_parameters", "rope_scaling"
    edit_config(folder, remove=names, **ROPE_SPELLINGS[spelling])
    model = grpo.load_model(folder)
    grpo.save_model(model, tmp_path / "export")
    assert torch.equal(same_logits(model, theirs_of(tmp_path / "export")), expected)
    edit_config(folder, remove=names, rope_theta=10 * THETA)
    with torch.no_grad():  # so a wrong base would show
        other = grpo.load_model(folder)
        assert (other.logits(other(random_tokens(2, 30))) - expected).abs().max() > 0.01


def test_bfloat16_is_widened(tmp_path):
    build(tmp_path, "qwen2", dtype=torch.bfloat16)
    model = grpo.load_model(tmp_path)
    same_logits(model, theirs_of(tmp_path))
    grpo.save_model(model, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"  # no rounding


def test_settings_that_may_be_absent(tmp_path):
    """As transformers reads them: key heads as heads, eps 1e-6, hidden_size / heads, untied."""
    build(tmp_path, "llama", num_key_value_heads=4, rms_norm_eps=1e-6)
    absent = "num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings"
    absent += "hidden_act", "eos_token_id", "attention_bias", "mlp_bias", "max_position_embeddings"
    edit_config(tmp_path, remove=absent)
    same_logits(grpo.load_model(tmp_path), theirs_of(tmp_path))


# ----------------------------------------------------------------------------------- cache, rows


@pytest.fixture(scope="module", params=["llama-mqa-tied", "qwen3-tied"])
def exact(request, sources):
    """A model in float64, where two ways to one number agree to 1e-9."""
    return grpo.load_model(sources[request.param]).double().requires_grad_(False)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (2, 9, 5, 1)]


def prefill(model, prompts, width):
    """A cache that holds the prompts, and reads `width` positions from now on."""
    cache, lengths = grpo.Cache(model, len(prompts), 20), [len(p) for p in prompts]
    cache.width = max(lengths)
    model(grpo.pad_rows(prompts, torch.device("cpu"), torch.long), cache)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.width = width
    return cache


def continued(model, row, added):
    """(T, C) hidden states of `added` after prompt `row`, without a cache."""
    return model(torch.cat([torch.tensor(PROMPTS[row]), added])[None])[0, -len(added) :]


def test_appending_at_different_offsets(exact):
    cache, added = prefill(exact, PROMPTS, 20), random_tokens(4, 11, seed=1)
    hidden = torch.cat([exact(part, cache) for part in added.split((4, 1, 6), dim=1)], dim=1)
    assert cache.lengths.tolist() == [13, 20, 16, 12]  # one row is full
    for row in range(4):
        close(hidden[row], continued(exact, row, added[row]))


def test_cut_row_goes_on_like_a_fresh_one(exact):
    cache, first = prefill(exact, PROMPTS, 20), random_tokens(4, 6, seed=3)
    exact(first, cache)
    kept = torch.tensor([5, 3, 11, 0])  # in the added part, in the prompt, nothing cut, all cut
    cache.lengths.copy_(kept)
    added = random_tokens(4, 5, seed=4)
    hidden = torch.cat([exact(added[:, :2], cache), exact(added[:, 2:], cache)], dim=1)
    assert cache.lengths.tolist() == (kept + 5).tolist()
    for row in range(4):
        cut = torch.cat([torch.tensor(PROMPTS[row]), first[row]])[: kept[row]]
        close(hidden[row], exact(torch.cat([cut, added[row]])[None])[0, -5:])


def test_select_rows_with_repeats(exact):
    cache, rows = prefill(exact, PROMPTS, 9), [2, 0, 0, 1, 2]
    cache.select(torch.tensor(rows))
    cache.width = 20
    assert cache.lengths.tolist() == [len(PROMPTS[row]) for row in rows]
    added = random_tokens(5, 4, seed=5)  # repeats of a row go different ways
    hidden = exact(added, cache)
    cache.select(torch.tensor([4, 1]))
    more = random_tokens(2, 1, seed=6)
    last = exact(more, cache)
    for i, row in enumerate(rows):
        close(hidden[i], continued(exact, row, added[i]))
    for i, kept in enumerate([4, 1]):
        close(last[i], continued(exact, rows[kept], torch.cat([added[kept], more[i]]))[-1:])


def test_embeddings_as_input(exact):
    tokens = random_tokens(3, 8)
    embeddings = exact.model.embed_tokens(tokens)
    close(exact(embeddings), exact(tokens))
    caches = [prefill(exact, PROMPTS[:3], 20) for _ in range(2)]
    close(exact(embeddings, caches[0]), exact(tokens, caches[1]))


def test_bfloat16_copy_samples_what_float32_weights_compute(sources):
    """On a GPU the sampler is a bfloat16 copy: its cache, its products; the logits are float32."""
    model = grpo.load_model(sources["llama"])
    copy = grpo.load_model(sources["llama"]).bfloat16()
    model.compute_dtype = copy.compute_dtype = torch.bfloat16
    cache = prefill(copy, PROMPTS, 20)
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.bfloat16
    with torch.no_grad():
        tokens = random_tokens(2, 30)
        ours, expected = (m.logits(m(tokens)) for m in (copy, model))
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)


# ------------------------------------------------------------------------- folders that are wrong

UP = "model.layers.1.mlp.up_proj.weight"
EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.bias"
DAMAGE = {  # what is done to the tensors of llama, or of llama-mqa-tied; what the message names
    "missing": ("llama", lambda t: t.pop(UP), UP),
    "no head": ("llama", lambda t: t.pop(HEAD), HEAD),  # config.json says it is not tied
    "extra": ("llama", lambda t: t.update({BIAS: torch.zeros(48)}), BIAS),
    "shape": ("llama", lambda t: t.update({UP: t[UP][:-1].clone()}), UP),
    "tied, differs": ("llama-mqa-tied", lambda t: t.update({HEAD: t[EMBED] + 1}), "tied"),
    "tied, missing": ("llama-mqa-tied", lambda t: t.update({HEAD: t.pop(EMBED)}), EMBED),
}
SETTINGS = {  # what the message names, and the settings
    "gemma3": {"model_type": "gemma3"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "window": {"use_sliding_window": True, "sliding_window": 16},
    "rope": {"rope_theta": None},
    "": {"hidden_size": "32"},
    "layers.2": {"num_hidden_layers": 3},
}


def refused(folder, part=""):
    """load_model refuses with one line that names the folder and what is wrong."""
    with pytest.raises(grpo.BadInput) as caught:
        grpo.load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and part in message, message


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_match(copy_of, case):
    source, change, part = DAMAGE[case]
    folder = copy_of(source)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, part)


def test_rotary_tables_that_are_stored_too(copy_of):
    """Llama 2's files hold one a layer."""
    folder = copy_of("llama")
    tensors = load_file(folder / "model.safetensors")
    before = grpo.load_model(folder).state_dict()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = grpo.load_model(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_head_that_is_stored_too(copy_of):
    folder = copy_of("llama-mqa-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBED].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = grpo.load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("part", SETTINGS)
def test_unsupported_setting(copy_of, part):
    folder = copy_of("llama")
    settings = {"rope_theta": THETA} | SETTINGS[part]
    edit_config(folder, remove=("rope_parameters",), **settings)
    refused(folder, part)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("size", [None, 0, 5, 1000])
def test_damaged_file(copy_of, name, size):
    path = copy_of("llama") / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size].rstrip(b"}\n "))
    refused(path.parent)


def test_missing_shard(copy_of):
    folder = copy_of("qwen2-sharded")
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()
    refused(folder, "model.layers")
    refused(folder / "nowhere", "nowhere")


# ---------------------------------------------------------------------------- tokenizer, end ids


def test_special_ids(copy_of, tmp_path):
    """End ids of config, generation config, tokenizer; ids beyond the tokenizer are not drawn."""
    folder = copy_of("llama")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V - 4)}, unk_token="w0"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_config(folder, eos_token_id=5)
    generation = {"eos_token_id": [7, 5], "suppress_tokens": [3]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for eos in ("w9", {"content": "w9"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        model = grpo.load_model(folder)
        assert model.eos_ids == [5, 7, 9] and model.tokenizer.token_to_id("w9") == 9
        assert model.vocab_bias.shape == (V,) and not model.is_tiny
        banned = (model.vocab_bias == -torch.inf).nonzero()[:, 0].tolist()
        assert banned == [3, V - 4, V - 3, V - 2, V - 1]
        assert (model.vocab_bias.isfinite() == (model.vocab_bias == 0)).all()
    grpo.save_model(model, tmp_path / "export")  # the tokenizer's files come along
    again = grpo.load_model(tmp_path / "export")
    assert again.eos_ids == model.eos_ids and torch.equal(again.vocab_bias, model.vocab_bias)
    assert again.tokenizer.to_str() == model.tokenizer.to_str()
    assert (tmp_path / "export" / "chat_template.jinja").exists()
    generation = theirs_of(tmp_path / "export").generation_config
    assert generation.eos_token_id == [7, 5] and generation.suppress_tokens == [3]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_prompt_begins_with_one_bos(copy_of, chat):
    """Where the tokenizer puts one; after a chat template it is the template that writes it."""
    folder = copy_of("llama")
    words = Tokenizer(models.WordLevel({"[unk]": 0, "<s>": 1, "</s>": 2}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0].content }}<think>\n")
    task = grpo.make_task("countdown")
    prompter = grpo.Prompter(grpo.load_model(folder), task, chat)
    text = prompter.text(task.problem("train", 0, 0))
    ids = prompter.encode(text)
    assert ids[0] == 1 and ids.count(1) == 1
    end = "</answer>.<think>" if chat else "</answer>.\nAssistant: Let me solve this step by step.\n<think>"
    assert text.rstrip().endswith(end)


# ----------------------------------------------------------------------------------- a real model

SMOLLM2 = os.environ.get("SMOLLM2", "")
smollm2 = pytest.mark.skipif(
    not Path(SMOLLM2, "config.json").exists(),
    reason="no real model: python tests/smollm2.py DIR makes one, then set SMOLLM2=DIR",
)
QUESTIONS = ["The capital of France is", "def add(a, b):\n", "1 + 1 = 2\n2 + 2 = 4\n3 + 3 ="]


@smollm2
def test_smollm2():
    model, reference = grpo.load_model(SMOLLM2), theirs_of(SMOLLM2)
    assert model.eos_ids == [2] and model.vocab_bias is None and not model.is_tiny
    prompts = [model.tokenizer.encode(text).ids for text in QUESTIONS]
    sampled = greedy(model, prompts, 20)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            tokens = torch.tensor([prompt])
            ours, expected = model.logits(model(tokens)), reference(tokens).logits
        assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))
        expected = reference_greedy(reference, prompt, 20, 2)
        assert sampled.tokens[row, : sampled.lengths[row]].tolist() == expected
