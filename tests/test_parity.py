"""The decoder against transformers: random tiny models of every family, saved, loaded by grpo.py.

Also the cache (a length per row, cuts, selection of rows), the export, end ids and BOS. A real
model is tried if SMOLLM2 names a folder made by tests/smollm2.py. What a folder may get wrong
stands in test_bad_input.py.
"""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT  # noqa: F401  (which makes the scripts importable)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    "qwen2-sharded": ("qwen2", SHARDED),
    "qwen2-bfloat16": ("qwen2", {"dtype": torch.bfloat16}),  # widened, so nothing is rounded
    "qwen3": ("qwen3", {"head_dim": 6}),
    "qwen3-tied-sharded": ("qwen3", {"head_dim": 12} | TIED | SHARDED),
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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(model of transformers, folder) of a case, built once."""

    @functools.cache
    def built(case):
        folder = tmp_path_factory.mktemp(case)
        family, changes = CASES[case]
        return build(folder, family, **changes), folder

    return built


@pytest.fixture(scope="module", params=CASES)
def pair(request, built):
    """(model of ours, model of transformers, folder) of one case."""
    reference, folder = built(request.param)
    return grpo.load_model(folder), reference, folder


@pytest.fixture
def copy_of(built, tmp_path):
    """A copy of a case's folder, to change."""
    return lambda case: Path(shutil.copytree(built(case)[1], tmp_path / "model"))


def random_tokens(rows, length, seed=0):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def edit_config(folder, remove=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in remove}
    (folder / "config.json").write_text(json.dumps(kept | changes))


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


def reference_greedy(reference, prompt, count, eos=None):
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": eos, "pad_token_id": 0}
    tokens = torch.tensor([prompt])
    found = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found[0, len(prompt) :].tolist()


def greedy(model, prompts, count):
    return grpo.generate(model, prompts, torch.zeros(len(prompts), count), temperature=0.0)


# -------------------------------------------------------------------------- against transformers


def test_logits_and_greedy_tokens(pair):
    model, reference, folder = pair
    assert ("sharded" in folder.name) == (len(list(folder.glob("*.safetensors"))) > 1)
    same_logits(model, reference)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 12)]
    sampled = greedy(model, prompts, 16)  # three lengths in one batch, with a cache
    assert sampled.tokens.tolist() == [reference_greedy(reference, p, 16) for p in prompts]
    assert sampled.lengths.tolist() == [16] * 3 and not sampled.finished.any()


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
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert ("lm_head.weight" in file.keys()) != reference.config.tie_word_embeddings


ROPE_SPELLINGS = {
    "theta": {"rope_theta": THETA},
    "parameters": {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}},
    "scaling-null": {"rope_theta": THETA, "rope_scaling": None},
    "scaling-default": {"rope_theta": THETA, "rope_scaling": {"rope_type": "default"}},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_rope_spellings(built, copy_of, spelling):
    folder = copy_of("llama")
    names = "rope_theta", "rope_parameters", "rope_scaling"
    edit_config(folder, remove=names, **ROPE_SPELLINGS[spelling])
    same_logits(grpo.load_model(folder), built("llama")[0])


def test_settings_that_may_be_absent(tmp_path):
    """As transformers reads them: key heads as heads, eps 1e-6, hidden_size / heads, untied."""
    build(tmp_path, "llama", num_key_value_heads=4, rms_norm_eps=1e-6)
    absent = "num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings"
    absent += "hidden_act", "eos_token_id", "attention_bias", "mlp_bias", "max_position_embeddings"
    edit_config(tmp_path, remove=absent)
    same_logits(grpo.load_model(tmp_path), theirs_of(tmp_path))


# ----------------------------------------------------------------------------------- cache, rows


@pytest.fixture(scope="module", params=["llama-mqa-tied", "qwen3"])
def exact(request, built):
    """A model in float64, where two ways to one number agree to 1e-9."""
    return grpo.load_model(built(request.param)[1]).double().requires_grad_(False)


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
    tokens, caches = random_tokens(3, 8), [prefill(exact, PROMPTS[:3], 20) for _ in range(2)]
    close(exact(exact.model.embed_tokens(tokens), caches[0]), exact(tokens, caches[1]))


def test_bfloat16_copy_samples_what_float32_weights_compute(built):
    """On a GPU the sampler is a bfloat16 copy: its cache, its products; the logits are float32."""
    _, folder = built("llama")
    model, copy = grpo.load_model(folder), grpo.load_model(folder).bfloat16()
    model.compute_dtype = copy.compute_dtype = torch.bfloat16
    cache = prefill(copy, PROMPTS, 20)
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.bfloat16
    with torch.no_grad():
        tokens = random_tokens(2, 30)
        ours, expected = (m.logits(m(tokens)) for m in (copy, model))
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)


# ------------------------------------------------------------------- what else a folder may hold


def test_tensors_that_are_stored_too(copy_of):
    """A table of rotary angles, as in Llama 2's files, and a tied head."""
    folder = copy_of("llama-mqa-tied")
    before, tensors = grpo.load_model(folder), load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = grpo.load_model(folder)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    same(after.state_dict(), before.state_dict())


@pytest.mark.parametrize("end", ["w9", {"content": "w9"}], ids=str)
def test_special_ids(copy_of, tmp_path, end):
    """End ids of config, generation config, tokenizer; ids beyond the tokenizer are not drawn."""
    folder = copy_of("llama")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V - 4)}, unk_token="w0"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_config(folder, eos_token_id=5)
    generation = {"eos_token_id": [7, 5], "suppress_tokens": [3]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    grpo.save_model(grpo.load_model(folder), tmp_path / "export")
    for path in (folder, tmp_path / "export"):  # the tokenizer's files come along
        model = grpo.load_model(path)
        assert model.eos_ids == [5, 7, 9] and not model.is_tiny
        expected = torch.zeros(V)
        expected[[3, V - 4, V - 3, V - 2, V - 1]] = -torch.inf
        assert torch.equal(model.vocab_bias, expected)
        assert model.tokenizer.to_str() == words.to_str()
        assert (path / "chat_template.jinja").exists()


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_prompt_begins_with_one_bos(copy_of, chat):
    """Where the tokenizer puts one; after a chat template it is the template that writes it."""
    folder = copy_of("llama")
    words = Tokenizer(models.WordLevel({"[unk]": 0, "<s>": 1, "</s>": 2}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>", "</s>"])
    bos = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    words.post_processor = processors.TemplateProcessing(**bos)
    words.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0].content }}<think>\n")
    task = grpo.make_task("countdown")
    prompter = grpo.Prompter(grpo.load_model(folder), task, chat)
    text = prompter.text(task.problem("train", 0, 0))
    ids = prompter.encode(text)
    assert ids[0] == 1 and ids.count(1) == 1
    assert text.rstrip().endswith("</answer>.<think>" if chat else "step by step.\n<think>")


# ----------------------------------------------------------------------------------- a real model

SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(
    not Path(SMOLLM2, "config.json").exists(),
    reason="no real model: python tests/smollm2.py DIR makes one, then set SMOLLM2=DIR",
)
def test_smollm2():
    model, reference = grpo.load_model(SMOLLM2), theirs_of(SMOLLM2)
    assert model.eos_ids == [2] and model.vocab_bias is None and not model.is_tiny
    for text in ("The capital of France is", "def add(a, b):\n", "1 + 1 = 2\n2 + 2 = 4\n3 + 3 ="):
        prompt = model.tokenizer.encode(text).ids
        sampled = greedy(model, [prompt], 20)
        expected = reference_greedy(reference, prompt, 20, eos=2)
        assert sampled.tokens[0, : sampled.lengths[0]].tolist() == expected
