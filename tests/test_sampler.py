"""The sampler and the log-probabilities of grpo.py: batch invariance, exact distributions, ends, masked logits.

Most tests run a random model in float64, where a completion has to be the same token by token however it is batched.
"""

import json
import math
import random
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

V = 23  # vocabulary
HIDDEN = 24
BELOW_1 = 1 - 2**-24  # the largest float32 below 1


def make_model(vocab=V, eos=(), banned=(), seed=0, **changes):
    """A random model in float64; its next-token distributions are far from uniform and from one token alone."""
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 32}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 100.0, "max_position_embeddings": 64, "tie_word_embeddings": False, "head_dim": 6}
    model = grpo.Model(config | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    model.eos_ids = list(eos)
    if banned:
        model.vocab_bias = torch.zeros(vocab).index_fill(0, torch.tensor(list(banned)), -torch.inf)
    return model.double().requires_grad_(False)


def make_prompts(count, seed=0, vocab=V):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.choice((1, 3, 4, 9, 14)))] for _ in range(count)]


def numbers(rows, steps, step=0):
    """(B, N) uniform numbers of rows [(prompt, sample), ...]."""
    return torch.from_numpy(np.stack([grpo.row_uniforms(1, step, prompt, sample, steps) for prompt, sample in rows]))


def ended(sampled, row):
    """What one row says: (tokens up to its length, finished)."""
    return sampled.tokens[row, : sampled.lengths[row]].tolist(), bool(sampled.finished[row])


def next_logits(model, tokens):
    """(V,) logits after these tokens, without cache, by the model's own head."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])))[0, -1]


# ------------------------------------------------------------------------------------------ the same whatever the batch

OPTIONS = {
    "plain": {},
    "cool-top-p": {"temperature": 0.7, "top_p": 0.8},
    "top-k": {"top_k": 5},
    "greedy": {"temperature": 0.0},
    "min-tokens": {"min_tokens": 6},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batch_invariance(options):
    model, prompts, group, steps = make_model(eos=(3, 7)), make_prompts(5), 4, 30
    rows = list(product(range(5), range(group)))
    alone = {}
    for prompt, sample in rows:
        sampled = grpo.generate(model, [prompts[prompt]], numbers([(prompt, sample)], steps), **options)
        alone[prompt, sample] = ended(sampled, 0), sampled.logprobs[0, : sampled.lengths[0]]
    if options.get("temperature", 1):
        assert len({len(tokens) for (tokens, _), _ in alone.values()}) > 5  # many leave early, so rows are compacted
    layouts = {
        "one batch": (rows, group),
        "prompts turned round": ([(p, s) for p in (4, 3, 2, 1, 0) for s in range(group)], group),
        "samples turned round": ([(p, s) for p in range(5) for s in (3, 2, 1, 0)], group),
        "every row its own prompt": (random.Random(0).sample(rows, len(rows)), 1),
        "half the group": ([(p, s) for p in (1, 3) for s in (2, 0)], 2),
        "one prompt": ([(2, s) for s in range(group)], group),
    }
    for name, (layout, size) in layouts.items():
        sampled = grpo.generate(model, [prompts[p] for p, _ in layout[::size]], numbers(layout, steps), **options)
        for row, key in enumerate(layout):
            expected, logprobs = alone[key]
            assert ended(sampled, row) == expected, name
            torch.testing.assert_close(sampled.logprobs[row, : len(logprobs)], logprobs, atol=1e-6, rtol=0)


def test_longer_limit_goes_on_from_the_same_tokens():
    model, prompts = make_model(eos=(3,)), make_prompts(4)
    rows = list(product(range(4), range(2)))
    short, long = (grpo.generate(model, prompts, numbers(rows, steps)) for steps in (9, 40))
    for row in range(8):
        assert ended(long, row)[0][: len(ended(short, row)[0])] == ended(short, row)[0]


def test_float32_differs_only_on_a_step_of_the_cdf():
    model, prompts, rows, steps = make_model(vocab=200), make_prompts(8), list(product(range(8), range(8))), 40
    uniforms = numbers(rows, steps)
    exact = grpo.generate(model, prompts, uniforms).tokens
    model.float()
    batch = grpo.generate(model, prompts, uniforms).tokens
    alone = torch.cat([grpo.generate(model, [prompts[p]], numbers([(p, s)], steps)).tokens for p, s in rows[::8]])
    model.double()
    same = 0
    for row, other in [*enumerate(batch), *zip(range(0, 64, 8), alone, strict=True)]:
        different = (exact[row] != other).nonzero()
        if not len(different):
            same += 1
            continue
        first = int(different[0])
        logits = next_logits(model, prompts[rows[row][0]] + exact[row, :first].tolist())
        gap = (logits.softmax(-1).cumsum(-1) - uniforms[row, first].double()).abs().min()
        assert gap < 1e-5, f"row {row} leaves at token {first}, {gap:.1e} from a step"
    assert same > 60  # of 72


# -------------------------------------------------------------------------------------------------------- distributions


def chi_square_limit(freedom, z=3.7):
    """The chi-square value exceeded with probability 1e-4 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def agrees(counts, probs):
    """Do counts come from probs (both by outcome)? Rare outcomes are pooled; an impossible one decides."""
    total, statistic, freedom, rare = sum(counts.values()), 0.0, -1, [0.0, 0.0]
    if any(probs.get(outcome, 0.0) == 0.0 for outcome in counts):
        return False
    for outcome, p in probs.items():
        if p * total < 8:
            rare = [rare[0] + counts.get(outcome, 0), rare[1] + p * total]
        else:
            statistic, freedom = statistic + (counts.get(outcome, 0) - p * total) ** 2 / (p * total), freedom + 1
    if rare[1]:
        statistic, freedom = statistic + (rare[0] - rare[1]) ** 2 / rare[1], freedom + 1
    return statistic < chi_square_limit(freedom) if freedom else True


def target(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The distribution asked for, token by token in plain Python."""
    weights = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for rank, (token, weight) in enumerate(sorted(weights.items(), key=lambda item: (-item[1], item[0]))):
        if (top_k and rank >= top_k) or mass >= top_p:
            break
        kept[token] = weight
        mass += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items() if weight}


LOGITS = [0.3, -1.2, 2.0, -math.inf, 0.9, -4.0, 0.3, 1.1, -2.5]
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_p": 0.85},
    {"top_p": 0.3},
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": 50},
    {"temperature": 1.5, "top_p": 0.9},
    {"top_p": 0.7, "top_k": 6},
    {"top_p": 0.95, "top_k": 2},
]


def drawn(temperature=1.0, top_p=1.0, top_k=0, count=20000):
    uniforms = torch.rand(count, 1, generator=torch.Generator().manual_seed(5))
    logits = (torch.tensor(LOGITS) / temperature).expand(count, -1)
    tokens = grpo.draw(logits.softmax(-1), uniforms, top_p=top_p, top_k=top_k)
    assert tokens.shape == (count, 1)
    return Counter(tokens[:, 0].tolist())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draw_has_the_right_distribution(setting):
    assert agrees(drawn(**setting), target(LOGITS, **setting))


WRONG = [
    ({}, {"temperature": 1.1}),
    ({"temperature": 1.1}, {}),
    ({"top_p": 0.85}, {"top_p": 0.6}),
    ({"top_p": 0.85}, {}),
    ({"top_k": 4}, {"top_k": 5}),
]


@pytest.mark.parametrize("asked, setting", WRONG, ids=str)
def test_the_test_sees_a_wrong_distribution(asked, setting):
    assert not agrees(drawn(**setting), target(LOGITS, **asked))


JOINT = [{}, {"temperature": 0.7}, {"temperature": 1.4, "top_p": 0.95}, {"top_k": 3}]


@pytest.mark.parametrize("setting", JOINT, ids=str)
def test_generate_has_the_right_joint_distribution(setting):
    """Three tokens of 20000 rows of one prompt, against every sequence enumerated; token 4 ends a row."""
    model, prompt, count = make_model(vocab=6, eos=(4,), banned=(5,), seed=3), [1, 2, 0], 20000
    probs = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, p in probs.items():
            if 4 in tokens:
                longer[tokens] = p
                continue
            for token, q in target(next_logits(model, prompt + list(tokens)).tolist(), **setting).items():
                longer[(*tokens, token)] = p * q
        probs = longer
    uniforms = numbers([(0, sample) for sample in range(count)], 3)
    sampled = grpo.generate(model, [prompt], uniforms, **setting)
    counts = Counter(tuple(ended(sampled, row)[0]) for row in range(count))
    assert len(probs) > 15 and agrees(counts, probs)
    warmer = setting | {"temperature": 1.15 * setting.get("temperature", 1)}
    wrong = grpo.generate(model, [prompt], uniforms, **warmer)
    assert not agrees(Counter(tuple(ended(wrong, row)[0]) for row in range(count)), probs)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.5, "top_k": 7}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_impossible_is_drawn(dtype, options):
    """Not even by the smallest and the largest number, and not if impossible tokens stand first or last."""
    generator = torch.Generator().manual_seed(0)
    largest = BELOW_1 if dtype == torch.float32 else 1 - 2**-53
    for vocab, scale in ((5, 1.0), (300, 5.0), (5000, 0.1), (5000, 40.0)):
        logits = (torch.randn(60, vocab, generator=generator) * scale).to(dtype)
        logits[:20, :2] = logits[20:40, -2:] = logits[10:60:7, 2] = -torch.inf
        for u in (0.0, 1e-30, 0.5, largest):
            tokens = grpo.draw(logits.softmax(-1), torch.full((60, 1), u, dtype=dtype), **options)
            assert (logits.softmax(-1).gather(1, tokens) > 0).all()
            if options.get("top_k"):
                rank = (logits > logits.gather(1, tokens)).sum(-1)
                assert (rank < options["top_k"]).all()


def test_draw_takes_the_first_token_above_the_number():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, BELOW_1])[:, None]
    assert grpo.draw(logits.softmax(-1), u)[:, 0].tolist() == [0, 0, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------- log-probabilities returned


@pytest.mark.parametrize("banned", [(), (0, 20, 21, 22)], ids=["all", "padded"])
@pytest.mark.parametrize("options", [*JOINT, {"temperature": 0.7, "top_p": 0.6}], ids=str)
def test_returned_logprobs_are_those_of_training(options, banned):
    model, prompts, steps = make_model(eos=(3, 7), banned=banned).float(), make_prompts(4), 25
    sampled = grpo.generate(model, prompts, numbers(list(product(range(4), range(3))), steps), **options)
    assert sampled.logprobs.dtype == torch.float32 and sampled.tokens.dtype == torch.long
    rows = [ended(sampled, row)[0] for row in range(12)]
    whole = [prompts[row // 3] + tokens for row, tokens in enumerate(rows)]
    masks = [[False] * len(prompts[row // 3]) + [True] * len(tokens) for row, tokens in enumerate(rows)]
    cpu = torch.device("cpu")
    tokens, mask = grpo.pad_rows(whole, cpu, torch.long), grpo.pad_rows(masks, cpu, torch.bool)
    logprobs, _ = grpo.completion_logprobs(model, tokens, mask, options.get("temperature", 1.0))
    ours = [p for row, length in enumerate(sampled.lengths) for p in sampled.logprobs[row, :length].tolist()]
    torch.testing.assert_close(logprobs[mask[:, 1:]], torch.tensor(ours), atol=1e-4, rtol=0)
    assert not {token for row in rows for token in row} & set(banned)


def test_banned_ids():
    """Never sampled, whatever the number; training sees the same masked distribution."""
    banned = (0, 11, 21, 22)
    plain, model = make_model(), make_model(banned=banned)
    grid = torch.linspace(0, BELOW_1, 200)[:, None].expand(-1, 3)
    for options in ({}, {"temperature": 3.0}, {"temperature": 0.0}, {"top_p": 0.99}):
        sampled = grpo.generate(model, [[5, 6]], grid, **options)
        assert not set(sampled.tokens.flatten().tolist()) & set(banned)
        assert sampled.logprobs.isfinite().all()
    assert set(grpo.generate(plain, [[5, 6]], grid, temperature=3.0).tokens.flatten().tolist()) >= set(banned)
    tokens, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    logits = plain.lm_head(plain(tokens))[:, :-1]
    logits[..., list(banned)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    ours, entropy = grpo.completion_logprobs(model, tokens, mask)
    torch.testing.assert_close(ours, expected)
    unmasked, _ = grpo.completion_logprobs(plain, tokens, mask)
    assert (ours - unmasked)[mask[:, 1:] == 1].abs().min() > 1e-3
    assert entropy.isfinite().all() and (entropy[mask[:, 1:] == 1] > 0).all()


# ----------------------------------------------------------------------------------------------------- where a row ends


def test_end_of_text():
    """Every id of the list ends a row; it is part of the row; before it all is as without."""
    prompts, rows, steps = make_prompts(6), list(product(range(6), range(5))), 33
    uniforms = numbers(rows, steps)
    free = grpo.generate(make_model(), prompts, uniforms)
    assert free.lengths.tolist() == [steps] * 30 and not free.finished.any()
    for eos in ((3,), (7, 3), (3, 7, 11, 2), tuple(range(V))):
        sampled = grpo.generate(make_model(eos=eos), prompts, uniforms)
        for row, tokens in enumerate(free.tokens.tolist()):
            first = next((i for i, token in enumerate(tokens) if token in eos), None)
            expected = (tokens, False) if first is None else (tokens[: first + 1], True)
            assert ended(sampled, row) == expected
    assert sampled.lengths.tolist() == [1] * 30  # every id ends the text


def test_end_of_text_as_the_last_token_allowed():
    uniforms = numbers([(0, 0)], 20)
    tokens = grpo.generate(make_model(), [[4, 5]], uniforms).tokens[0].tolist()
    first = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 3)
    for limit, finished in ((first, False), (first + 1, True), (first + 2, True)):
        sampled = grpo.generate(make_model(eos=(tokens[first],)), [[4, 5]], uniforms[:, :limit])
        assert ended(sampled, 0) == (tokens[: first + 1][:limit], finished)


@pytest.mark.parametrize("least", [1, 4, 12, 50])
def test_min_tokens(least):
    eos = tuple(range(0, V, 2))  # a row ends at about every second token
    prompts, uniforms = make_prompts(4), numbers(list(product(range(4), range(5))), 20)
    sampled = grpo.generate(make_model(eos=eos), prompts, uniforms, min_tokens=least)
    lengths, finished = sampled.lengths, sampled.finished
    assert (lengths > least).all() if least < 15 else (lengths == 20).all()
    assert finished.any() == (least < 15)
    for row in range(20):
        tokens, is_finished = ended(sampled, row)
        assert [token in eos for token in tokens] == [False] * (len(tokens) - 1) + [is_finished]
    banned = grpo.generate(make_model(banned=eos), prompts, uniforms[:, : min(least, 20)])  # the rest as if impossible
    assert torch.equal(sampled.tokens[:, :least], banned.tokens)


PIECES = ["a", "b", "c", "ab", "bca", ".", "cc", "<e>"]  # some tokens hold the end of a stop string and more


@pytest.fixture(scope="module")
def letters():
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="."))
    tokenizer.decoder = decoders.Fuse()
    assert tokenizer.decode([0, 1, 4, 7], skip_special_tokens=False) == "abbca<e>"
    return tokenizer


def stopped(tokens, stop, eos):
    """Where a row ends, found token by token: (tokens, finished)."""
    for end in range(1, len(tokens) + 1):
        text = "".join(PIECES[token] for token in tokens[:end])
        if tokens[end - 1] in eos or any(word in text for word in stop):
            return tokens[:end], True
    return tokens, False


STOPS = [("ccab",), ("abca", "bbb"), (".c.",), ("bca.", "<e>"), ("never there",), ("aaaa", "cabcab", "cbc")]


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings(letters, stop, steps):
    prompts, rows = make_prompts(4, vocab=8), list(product(range(4), range(6)))
    model, uniforms = make_model(vocab=8), numbers(rows, steps)
    free = grpo.generate(model, prompts, uniforms, temperature=2.0).tokens.tolist()
    sampled = grpo.generate(model, prompts, uniforms, temperature=2.0, stop=stop, tokenizer=letters)
    for row, tokens in enumerate(free):
        assert ended(sampled, row) == stopped(tokens, stop, ())


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings_and_end_of_text(letters, stop):
    prompts, rows, steps, eos = make_prompts(8, vocab=8), list(product(range(8), range(8))), 29, (5,)
    free = grpo.generate(make_model(vocab=8), prompts, numbers(rows, steps), temperature=2.0).tokens.tolist()
    model = make_model(vocab=8, eos=eos)
    sampled = grpo.generate(model, prompts, numbers(rows, steps), temperature=2.0, stop=stop, tokenizer=letters)
    assert [ended(sampled, row) for row in range(64)] == [stopped(tokens, stop, eos) for tokens in free]


def test_stop_string_in_the_prompt_stops_nothing(letters):
    model = make_model(vocab=8, banned=(5,))  # no "."
    sampled = grpo.generate(model, [[5, 5, 5, 5]], numbers([(0, 0)], 12), stop=("..",), tokenizer=letters)
    assert sampled.lengths.tolist() == [12] and not sampled.finished.any()


# ---------------------------------------------------------------------------------------------------- shapes and limits


def test_no_new_tokens():
    sampled = grpo.generate(make_model(), make_prompts(2), torch.zeros(4, 0))
    assert sampled.tokens.shape == sampled.logprobs.shape == (4, 0)
    assert sampled.lengths.tolist() == [0] * 4 and sampled.finished.tolist() == [False] * 4


def test_each_prompt_runs_once_and_finished_rows_leave():
    model, prompts, shapes = make_model(eos=(3, 7)), make_prompts(4), []
    hook = model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    sampled = grpo.generate(model, prompts, numbers(list(product(range(4), range(8))), 60))
    hook.remove()
    assert shapes[0] == (4, max(map(len, prompts)))  # the group shares it
    assert all(length == 1 for _, length in shapes[1:])
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[0] <= 32
    assert sum(rows) < 1.5 * int(sampled.lengths.sum())  # little is computed for rows that have ended
    assert len(shapes) <= int(sampled.lengths.max())  # and nothing when all have


def test_large_group():
    model, prompt = make_model(eos=(3, 7)), [4, 9, 1]
    uniforms = numbers([(0, sample) for sample in range(500)], 12)
    sampled = grpo.generate(model, [prompt], uniforms)
    for row in (0, 1, 250, 499):
        assert ended(sampled, row) == ended(grpo.generate(model, [prompt], uniforms[row : row + 1]), 0)


def test_prompt_beyond_max_position_embeddings():
    model = make_model(max_position_embeddings=8)
    prompts = [list(range(20)), [1, 2]]
    sampled = grpo.generate(model, prompts, torch.zeros(2, 10), temperature=0.0)
    for prompt, tokens in zip(prompts, sampled.tokens.tolist(), strict=True):
        whole = prompt + tokens
        assert all(int(next_logits(model, whole[:n]).argmax()) == whole[n] for n in range(len(prompt), len(whole)))


def test_prompts_are_not_changed():
    prompts, uniforms = make_prompts(3), numbers(list(product(range(3), range(2))), 6)
    before = json.dumps(prompts), uniforms.clone()
    grpo.generate(make_model(eos=(3,)), prompts, uniforms)
    assert json.dumps(prompts) == before[0] and torch.equal(uniforms, before[1])


def test_greedy_equals_transformers_with_several_end_ids(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4, "bos_token_id": None}
    reference = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=[3, 7, 11, 15], pad_token_id=0)).eval()
    reference.save_pretrained(tmp_path)
    model, prompts = grpo.load_model(tmp_path), make_prompts(8)
    assert sorted(model.eos_ids) == [3, 7, 11, 15]
    sampled = grpo.generate(model, prompts, torch.zeros(8, 30), temperature=0.0)
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": [3, 7, 11, 15], "pad_token_id": 0}
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        expected = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :]
        assert ended(sampled, row) == (expected.tolist(), expected[-1].item() in model.eos_ids)
    assert 0 < int(sampled.finished.sum()) and len(set(sampled.lengths.tolist())) > 2


# ------------------------------------------------------------------------------------------------------- random numbers


def test_row_uniforms():
    np.random.seed(0)
    torch.manual_seed(0)
    keys = list(product((0, 1, 2**31), (0, 1, 7), (0, 1, 2, 100000), (0, 1, 2, 15)))
    found = {key: grpo.row_uniforms(*key, 64) for key in keys}
    np.random.seed(1)
    for key in reversed(keys):  # another order, another global state
        again = grpo.row_uniforms(*key, 64)
        assert again.dtype == np.float32 and again.shape == (64,)
        assert (again == found[key]).all() and (grpo.row_uniforms(*key, 20) == again[:20]).all()
    values = np.stack(list(found.values()))
    assert values.min() >= 0 and values.max() < 1
    assert len({row.tobytes() for row in values}) == len({row[0] for row in values}) == len(keys)
    assert grpo.row_uniforms(0, 0, 0, 0, 0).shape == (0,)


def test_row_uniforms_are_uniform_and_independent():
    values = np.stack([grpo.row_uniforms(0, 3, prompt, sample, 50) for prompt in range(20) for sample in range(20)])
    bins = Counter((values.flatten() * 50).astype(int).tolist())
    assert agrees(bins, dict.fromkeys(range(50), 1 / 50))
    above, below = ((part * 7).astype(int).flatten().tolist() for part in (values[:-1], values[1:]))
    pairs = Counter(zip(above, below, strict=True))
    assert agrees(pairs, dict.fromkeys(product(range(7), repeat=2), 1 / 49))  # a row against the next


# ---------------------------------------------------------------------------------------------------- log-probabilities


def training_batch(seed=0):
    """Tokens (5, 12) and a mask with holes; one row trains nothing."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (5, 12), generator=generator)
    mask = torch.rand(5, 12, generator=generator) < 0.6
    mask[2] = False
    return tokens, mask


def naive(model, tokens, mask, temperature=1.0):
    """Every logit at once, by log_softmax."""
    logprobs = (model.lm_head(model(tokens))[:, :-1] / temperature).log_softmax(-1)  # (B, T-1, V)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    trained = mask[:, 1:].to(logprobs.dtype)
    return logprobs.gather(-1, tokens[:, 1:, None])[..., 0] * trained, entropy * trained


@pytest.mark.parametrize("chunk", [2**26, 10 * V, V, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_completion_logprobs(temperature, chunk):
    model, (tokens, mask) = make_model(), training_batch()
    model.requires_grad_()
    results = []
    for function in (naive, lambda *args: grpo.completion_logprobs(*args, chunk)):
        model.zero_grad()
        logprobs, entropy = function(model, tokens, mask, temperature)
        (logprobs * torch.linspace(-1, 2, 55).view(5, 11)).sum().backward()
        results.append((logprobs, entropy, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (expected, entropy, gradients), (ours, our_entropy, our_gradients) = results
    assert ours.shape == our_entropy.shape == (5, 11)
    assert (ours[~mask[:, 1:]] == 0).all() and (our_entropy[~mask[:, 1:]] == 0).all()
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(our_entropy.detach(), entropy.detach(), atol=1e-10, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-10, rtol=0, msg=name)


def test_completion_logprobs_of_bfloat16_products_are_float32():
    model, (tokens, mask) = make_model().float(), training_batch()
    model.compute_dtype = torch.bfloat16
    logprobs, entropy = grpo.completion_logprobs(model, tokens, mask)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - naive(make_model(), tokens, mask)[0]).abs().max() < 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_and_neighbours_change_nothing(checkpointing):
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()
    model.checkpointing = checkpointing

    def gradients_of(parts):
        model.zero_grad()
        found = []
        for tokens, mask in parts:
            logprobs, _ = grpo.completion_logprobs(model, tokens, mask, 0.8)
            logprobs.sum().backward()
            found.append(logprobs.detach()[:, :11])
        return torch.cat(found), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients_of([(tokens, mask)])
    padded = torch.cat([tokens, torch.full((5, 6), 9)], 1), torch.cat([mask, torch.zeros(5, 6, dtype=torch.bool)], 1)
    layouts = {
        "alone": [(tokens[i : i + 1], mask[i : i + 1]) for i in range(5)],
        "pairs": [(tokens[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)],
        "padded": [padded],
        "whole numbers as mask": [(tokens, mask.long())],
    }
    for name, parts in layouts.items():
        for ours, whole in zip(gradients_of(parts), expected, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-10, rtol=0, msg=name)


def shared_batch():
    """Six rows behind three prompts of unequal length: tokens and mask (6, T), and the prompts of the rows."""
    rng, rows = random.Random(5), [0, 2, 1, 0, 1, 0]
    prompts = [[rng.randrange(V) for _ in range(n)] for n in (12, 9, 1)]
    parts = [(prompts[i], [rng.randrange(V) for _ in range(rng.randint(1, 5))]) for i in rows]
    cpu = torch.device("cpu")
    tokens = grpo.pad_rows([prompt + own for prompt, own in parts], cpu, torch.long)
    return tokens, grpo.pad_rows([[False] * len(p) + [True] * len(own) for p, own in parts], cpu, torch.bool), rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prompt_that_rows_share_runs_once(checkpointing):
    """Log-probabilities and gradients are those of whole rows, and the model sees each prompt once."""
    model, (tokens, mask, _) = make_model().requires_grad_(), shared_batch()
    results, shapes = [], []
    model.checkpointing = checkpointing
    for function in (naive, grpo.completion_logprobs):
        model.zero_grad()
        hook = model.register_forward_hook(lambda module, inputs, hidden: shapes.append(tuple(hidden.shape[:2])))
        logprobs, _ = function(model, tokens, mask, 0.9)
        hook.remove()
        (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
        results.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    whole, prompts, own = shapes
    assert whole == tuple(tokens.shape) and prompts == (3, 11) and own[0] == 6 and own[1] < whole[1]
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_prompts_are_shared_only_where_it_pays():
    model, (tokens, mask, _), shapes = make_model(), shared_batch(), []
    model.register_forward_hook(lambda module, inputs, hidden: shapes.append(tuple(hidden.shape[:2])))
    long = torch.cat([tokens, torch.ones(6, 60, dtype=torch.long)], 1), torch.cat([mask, torch.ones(6, 60).bool()], 1)
    for batch in (long, (tokens[[0, 1, 2]], mask[[0, 1, 2]]), (tokens, torch.ones_like(mask))):
        shapes.clear()
        grpo.trained_hidden(model, *batch)
        assert shapes == [(len(batch[0]), batch[0].shape[1] - 1)]


def test_nothing_to_train():
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()
    logprobs, entropy = grpo.completion_logprobs(model, tokens, torch.zeros_like(mask))
    assert logprobs.shape == entropy.shape == (5, 11) and not logprobs.any() and not entropy.any()
    logprobs.sum().backward()  # ranks without trained rows still take part
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class LargestLogits(TorchDispatchMode):
    """The number of elements of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.largest = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape[-1] != self.vocab:
                continue
            if tensor.shape[-2] != HIDDEN:  # not the gradient of the head, turned
                self.largest = max(self.largest, tensor.numel())
        return out


def test_chunks_bound_the_logits():
    """Forward and backward, and only trained positions go through the head."""
    model = make_model(vocab=101).requires_grad_()
    tokens, mask = training_batch(seed=2)
    trained = int(mask[:, 1:].sum())
    assert trained != HIDDEN
    for chunk, expected in ((2**26, trained * 101), (505, 505), (600, 505), (1, 101)):
        with LargestLogits(101) as seen:
            grpo.completion_logprobs(model, tokens, mask, chunk=chunk)[0].sum().backward()
        assert seen.largest == expected


# ------------------------------------------------------------------------------------------------------ batches of rows


def test_pad_rows():
    cpu = torch.device("cpu")
    padded = grpo.pad_rows([[1, 2], [3], [], [4, 5, 6]], cpu, torch.long)
    assert padded.dtype == torch.long and padded.tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 6]]
    assert grpo.pad_rows([[True], [False, True]], cpu, torch.bool).tolist() == [[True, False], [False, True]]
    assert grpo.pad_rows([[0.5], [1.5, -2.0]], cpu, torch.float32).tolist() == [[0.5, 0.0], [1.5, -2.0]]


CHEAPEST = {  # length of the prompts, lengths of the answers, two to a prompt; rows together
    "by prompt": (20, (5, 7, 9, 11, 13, 15), [[1, 0], [3, 2], [5, 4]]),
    "by length": (1, (30, 2, 30, 2), [[0, 2], [1, 3]]),
}


@pytest.mark.parametrize("case", CHEAPEST)
def test_training_batches_are_the_cheapest(case):
    prompt, lengths, expected = CHEAPEST[case]
    run = SimpleNamespace(cfg=SimpleNamespace(micro_batch_tokens=70), device=torch.device("cpu"))
    done = [SimpleNamespace(number=i // 2, prompt=[7] * prompt, tokens=[3] * n) for i, n in enumerate(lengths)]
    batches = list(grpo.training_batches(run, done, list(range(len(done)))))
    assert [rows for rows, _, _ in batches] == expected
    for rows, tokens, mask in batches:
        assert mask.sum(1).tolist() == [lengths[i] for i in rows]
        assert (tokens[mask] == 3).all() and (tokens[~mask] != 3).all()


def test_micro_batches():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(0, 30))]
        budget = rng.choice((1, 20, 64, 100, 1000))
        batches = grpo.micro_batches(lengths, budget)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert batch and (len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget)
        longest = [max(lengths[row] for row in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)  # the largest batch first: memory shows at once
        assert batches == grpo.micro_batches(lengths, budget)
        if budget == 1000 and sum(lengths) and len(lengths) * max(lengths) <= budget:
            assert len(batches) == 1
    assert grpo.micro_batches([3, 9, 4, 8], 18) == [[1, 3], [2, 0]]


def test_top_p_of_nothing_keeps_the_likeliest():
    logits, uniforms = torch.tensor([[0.0, 2.0, 1.0]]).repeat(5, 1), torch.linspace(0, 0.99, 5)[:, None]
    assert grpo.draw(logits.softmax(-1), uniforms, top_p=0.0).flatten().tolist() == [1] * 5


# --------------------------------------------------------------------------------------------------- oneDNN's products

by_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@by_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 512)])
def test_product_of_onednn(shape, bias):
    """Values and all gradients are F.linear's, packed or not."""
    torch.manual_seed(0)
    layer, x = grpo.Linear(512, 256, bias=bias), torch.randn(shape)
    results = []
    for module in (lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias), layer):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        out = module(given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    assert layer.by_onednn(torch.float32) and type(layer(x).grad_fn).__name__ in ("ProductBackward", "AddBackward0")
    layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), results[0][0], atol=2e-4, rtol=1e-4)


@by_onednn
def test_packed_is_for_large_float32_layers_and_ends():
    model = make_model().float()
    model.lm_head = grpo.Linear(HIDDEN, 3000, bias=False)
    with pytest.raises(KeyError), grpo.packed(model):
        assert model.lm_head.packed is not None
        assert sum(m.packed is not None for m in model.modules() if isinstance(m, grpo.Linear)) == 1
        raise KeyError
    assert model.lm_head.packed is None  # whatever happened inside
    for other in (model.double(), model.bfloat16()):
        with grpo.packed(other):
            assert other.lm_head.packed is None
