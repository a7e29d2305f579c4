"""The decoder against transformers: random tiny models of every family, saved, loaded by grpo.py.

Also the cache, the export, end ids and BOS. What is wrong with a folder: test_bad_input.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import grpo

V = 67  # vocabulary
THETA = 500.0  # rope base, far from every default
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TIED, SHARDED = {"tie_word_embeddings": True}, {"max_shard_size": "10KB"}
CASES = {  # name: family, what differs from 4 heads of 8 on 2 keys, an untied head, one file
    "llama": ("llama", {}),
    "llama-mha-wide-sharded": ("llama", {"num_key_value_heads": 4, "head_dim": 16} | SHARDED),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1} | TIED),
    "qwen2-bfloat16": ("qwen2", {"dtype": torch.bfloat16} | SHARDED),  # widened: no rounding
    "qwen3": ("qwen3", {"head_dim": 6}),
    "qwen3-tied": ("qwen3", {"head_dim": 12} | TIED),
}


def theirs_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.25)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs_of(folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(model of ours, model of transformers, folder) of one case."""
    folder, (family, changes) = tmp_path_factory.mktemp(request.param), CASES[request.param]
    reference = build(folder, family, **changes)
    return grpo.load_model(folder), reference, folder


def random_tokens(rows, length, seed=0):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(ours, expected):
    torch.testing.assert_close(dict(ours), dict(expected), atol=0, rtol=0)


@torch.no_grad()
def same_logits(model, reference):
    """Within 1e-4 of transformers; returns ours."""
    tokens = random_tokens(2, 30)
    ours, expected = model.logits(model(tokens)), reference(tokens).logits
    assert ours.shape == (2, 30, V) and expected.std() > 0.5  # else agreement says little
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    return ours


def test_logits_and_greedy_tokens(pair):
    model, reference, _ = pair
    same_logits(model, reference)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 12)]
    sampled = grpo.generate(model, prompts, torch.zeros(3, 16), temperature=0.0)  # with a cache
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    for prompt, ours in zip(prompts, sampled.tokens.tolist(), strict=True):
        tokens = torch.tensor([prompt])
        found = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert ours == found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(pair, checkpointing):
    model, reference, _ = pair
    tokens, model.checkpointing = random_tokens(2, 12), checkpointing
    model.zero_grad()
    reference.zero_grad()
    for logits in (model.logits(model(tokens)), reference(tokens).logits):
        logprobs = logits[:, :-1].log_softmax(-1)
        logprobs.gather(-1, tokens[:, 1:, None]).mean().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, reference))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)  # a tied head counts once


def test_export(pair, tmp_path):
    _, reference, folder = pair
    model = grpo.load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # as if trained
    grpo.save_model(model, tmp_path)
    exported, again = theirs_of(tmp_path), grpo.load_model(tmp_path)
    assert type(exported) is type(reference)
    assert torch.equal(same_logits(again, exported), same_logits(model, exported))
    same(again.state_dict(), exported.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())  # old and new readers
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert config["dtype"] == config["torch_dtype"] == "float32"
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != reference.config.tie_word_embeddings


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}], ids=str)
def test_other_spellings(tmp_path, scaling):
    """As transformers reads what is absent: rope, heads, eps 1e-6, hidden_size / heads, untied."""
    build(tmp_path, "llama", num_key_value_heads=4, rms_norm_eps=1e-6)
    absent = "num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings"
    absent += "hidden_act", "eos_token_id", "attention_bias", "mlp_bias", "rope_parameters"
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_theta": THETA, "rope_scaling": scaling}
    kept = {name: value for name, value in config.items() if name not in absent}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    same_logits(grpo.load_model(tmp_path), theirs_of(tmp_path))


@pytest.fixture(scope="module", params=["llama-mqa-tied", "qwen3"])
def exact(request, tmp_path_factory):
    """A model in float64, where two ways to one number agree to 1e-9."""
    folder, (family, changes) = tmp_path_factory.mktemp("exact"), CASES[request.param]
    build(folder, family, **changes)
    return grpo.load_model(folder).double().requires_grad_(False)


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


def test_rows_of_a_cache_are_cut_and_go_on(exact):
    """Each at its own length, as if nothing had been there."""
    cache, first, more = prefill(exact, PROMPTS, 20), random_tokens(4, 11), random_tokens(4, 9)
    hidden = torch.cat([exact(part, cache) for part in first.split((4, 1, 6), dim=1)], dim=1)
    assert cache.lengths.tolist() == [13, 20, 16, 12]  # one row is full
    kept = [5, 3, 11, 0]  # in the added part, in the prompt, more than others, all cut
    cache.lengths.copy_(torch.tensor(kept))
    again = torch.cat([exact(more[:, :2], cache), exact(more[:, 2:], cache)], dim=1)
    assert cache.lengths.tolist() == [14, 12, 20, 9]
    for row in range(4):
        close(hidden[row], continued(exact, row, first[row]))
        text = torch.cat([torch.tensor(PROMPTS[row]), first[row]])[: kept[row]]
        close(again[row], exact(torch.cat([text, more[row]])[None])[0, -9:])


def test_select_rows_with_repeats(exact):
    cache, rows = prefill(exact, PROMPTS, 9), [2, 0, 0, 1, 2]
    cache.select(torch.tensor(rows))
    cache.width = 20
    added = random_tokens(5, 4, seed=5)  # repeats of a row go different ways
    hidden = exact(added, cache)
    cache.select(torch.tensor([4, 1]))
    more = random_tokens(2, 1, seed=6)
    last = exact(more, cache)
    for i, row in enumerate(rows):
        close(hidden[i], continued(exact, row, added[i]))
    for i, kept in enumerate([4, 1]):
        close(last[i], continued(exact, rows[kept], torch.cat([added[kept], more[i]]))[-1:])


def test_bfloat16_copy_samples_what_float32_weights_compute(tmp_path):
    """On a GPU the sampler is a bfloat16 copy: its cache, its products; the logits are float32."""
    build(tmp_path, "llama")
    model, copy = grpo.load_model(tmp_path), grpo.load_model(tmp_path).bfloat16()
    model.compute_dtype = copy.compute_dtype = torch.bfloat16
    assert prefill(copy, PROMPTS, 20).keys[0].dtype == torch.bfloat16
    ours, expected = (m.logits(m(random_tokens(2, 30))) for m in (copy, model))
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)


@pytest.mark.parametrize("end", ["w9", {"content": "w9"}], ids=str)
def test_special_ids(tmp_path, end):
    """End ids of config, generation config, tokenizer; ids beyond the tokenizer are not drawn."""
    build(tmp_path, "llama", eos_token_id=5)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V - 4)}, unk_token="w0"))
    words.save(str(tmp_path / "tokenizer.json"))
    generation = {"eos_token_id": [7, 5], "suppress_tokens": [3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    grpo.save_model(grpo.load_model(tmp_path), tmp_path / "export")
    for path in (tmp_path, tmp_path / "export"):  # the tokenizer's files come along
        model = grpo.load_model(path)
        assert model.eos_ids == [5, 7, 9] and not model.is_tiny
        banned = model.vocab_bias.isinf().nonzero().flatten().tolist()
        assert banned == [3, V - 4, V - 3, V - 2, V - 1] and model.vocab_bias.max() == 0
        assert model.tokenizer.to_str() == words.to_str()


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_prompt_begins_with_one_bos(tmp_path, chat):
    """Where the tokenizer puts one; after a chat template it is the template that writes it."""
    build(tmp_path, "llama")
    words = Tokenizer(models.WordLevel({"[unk]": 0, "<s>": 1}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>"])
    bos = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    words.post_processor = processors.TemplateProcessing(**bos)
    words.save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}<think>\n")
    task = grpo.make_task("countdown")
    prompter = grpo.Prompter(grpo.load_model(tmp_path), task, chat)
    ids = prompter.encode(prompter.text(task.problem("train", 0, 0)))
    assert ids[0] == 1 and ids.count(1) == 1
