"""The sampler and the log-probabilities of grpo.py: batches, distributions, ends, masked logits.

Most tests run a random model in float64, where a completion has to be the same token by token
however it is batched.
"""

import math
import random
import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

V = 23  # vocabulary
HIDDEN = 24
BELOW_1 = 1 - 2**-24  # the largest float32 below 1
CPU = torch.device("cpu")


def make_model(vocab=V, eos=(), banned=(), seed=0, **changes):
    """A random model in float64; its distributions are far from uniform and from one token."""
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN}
    config |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5, "rope_theta": 100.0}
    model = grpo.Model(config | {"tie_word_embeddings": False} | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    model.eos_ids = list(eos)
    if banned:
        model.vocab_bias = torch.zeros(vocab)
        model.vocab_bias[list(banned)] = -torch.inf
    return model.double().requires_grad_(False)


def make_prompts(count, seed=0, vocab=V):
    rng, lengths = random.Random(seed), (1, 3, 4, 9, 14)
    return [[rng.randrange(vocab) for _ in range(rng.choice(lengths))] for _ in range(count)]


def pairs(prompts, samples):
    """Row keys (prompt, sample), group by group."""
    return list(product(range(prompts), range(samples)))


def numbers(rows, steps):
    """(B, N) uniform numbers of rows [(prompt, sample), ...]."""
    return torch.from_numpy(np.stack([grpo.row_uniforms(1, 0, *row, steps) for row in rows]))


def ended(sampled, row):
    """What one row says: (tokens up to its length, finished)."""
    return sampled.tokens[row, : sampled.lengths[row]].tolist(), bool(sampled.finished[row])


def next_logits(model, tokens):
    """(V,) logits after these tokens, without cache, by the model's own head."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])))[0, -1]


# ------------------------------------------------------------------- the same whatever the batch


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_batch_invariance(temperature):
    model, prompts, group, steps = make_model(eos=(3, 7)), make_prompts(5), 4, 30
    rows, alone = pairs(5, group), {}
    for row in rows:
        s = grpo.generate(model, [prompts[row[0]]], numbers([row], steps), temperature)
        alone[row] = ended(s, 0), s.logprobs[0, : s.lengths[0]]
    if temperature:  # many leave early, so rows are compacted
        assert len({len(tokens) for (tokens, _), _ in alone.values()}) > 5
    layouts = {
        "one batch": (rows, group),
        "prompts turned round": (rows[::-1], group),
        "every row its own prompt": (random.Random(0).sample(rows, len(rows)), 1),
        "half the group": ([(p, s) for p in (1, 3) for s in (2, 0)], 2),
        "one prompt": ([(2, s) for s in range(group)], group),
    }
    for name, (layout, size) in layouts.items():
        asked = [prompts[p] for p, _ in layout[::size]]
        s = grpo.generate(model, asked, numbers(layout, steps), temperature)
        for row, key in enumerate(layout):
            expected, logprobs = alone[key]
            assert ended(s, row) == expected, name
            ours = s.logprobs[row, : len(logprobs)]
            torch.testing.assert_close(ours, logprobs, atol=1e-6, rtol=0)


def test_longer_limit_goes_on_from_the_same_tokens():
    model, prompts = make_model(eos=(3,)), make_prompts(4)
    short, long = (grpo.generate(model, prompts, numbers(pairs(4, 2), n)) for n in (9, 40))
    for row in range(8):
        assert ended(long, row)[0][: len(ended(short, row)[0])] == ended(short, row)[0]


def test_float32_differs_only_on_a_step_of_the_cdf():
    model, prompts, rows, steps = make_model(vocab=200), make_prompts(8), pairs(8, 8), 40
    uniforms = numbers(rows, steps)
    exact = grpo.generate(model, prompts, uniforms).tokens
    model.float()
    batch = grpo.generate(model, prompts, uniforms).tokens
    model.double()
    same = 0
    for row, other in enumerate(batch):
        different = (exact[row] != other).nonzero()
        if not len(different):
            same += 1
            continue
        first = int(different[0])
        logits = next_logits(model, prompts[row // 8] + exact[row, :first].tolist())
        gap = (logits.softmax(-1).cumsum(-1) - uniforms[row, first].double()).abs().min()
        assert gap < 1e-5, f"row {row} leaves at token {first}, {gap:.1e} from a step"
    assert same > 54  # of 64


# --------------------------------------------------------------------------------- distributions


def chi_square_limit(freedom, z=3.7):
    """The chi-square value exceeded with probability 1e-4 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def agrees(counts, probs):
    """Do counts come from probs? Rare outcomes are pooled; an impossible one decides."""
    total, statistic, freedom, rare_seen, rare = sum(counts.values()), 0.0, -1, 0, 0.0
    if any(probs.get(outcome, 0.0) == 0.0 for outcome in counts):
        return False
    for outcome, p in probs.items():
        seen, expected = counts.get(outcome, 0), p * total
        if expected < 8:
            rare_seen, rare = rare_seen + seen, rare + expected
        else:
            statistic, freedom = statistic + (seen - expected) ** 2 / expected, freedom + 1
    if rare:
        statistic, freedom = statistic + (rare_seen - rare) ** 2 / rare, freedom + 1
    return statistic < chi_square_limit(freedom)


def target(logits, temperature=1.0):
    """The distribution asked for, in plain Python."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return {token: w / sum(weights) for token, w in enumerate(weights) if w}


LOGITS = [0.3, -1.2, 2.0, -math.inf, 0.9, -4.0, 0.3, 1.1, -2.5]


@pytest.mark.parametrize("asked", [0.6, 1.0, 1.1, 1.7])
def test_draw_has_the_right_distribution(asked):
    """And the test would see a temperature that is off by a tenth."""
    uniforms = torch.rand(20000, 1, generator=torch.Generator().manual_seed(5))
    for temperature in (asked, 1.1 * asked, asked / 1.1):
        probs = (torch.tensor(LOGITS) / temperature).softmax(-1).expand(20000, -1)
        tokens = grpo.draw(probs, uniforms)
        assert tokens.shape == (20000, 1)
        counts = Counter(tokens[:, 0].tolist())
        assert agrees(counts, target(LOGITS, asked)) == (temperature == asked)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_generate_has_the_right_joint_distribution(temperature):
    """Three tokens of 20000 rows, against every sequence enumerated; token 4 ends a row."""
    model, prompt, count = make_model(vocab=6, eos=(4,), banned=(5,), seed=3), [1, 2, 0], 20000
    probs = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, p in probs.items():
            if 4 in tokens:
                longer[tokens] = p
                continue
            logits = next_logits(model, prompt + list(tokens)).tolist()
            for token, q in target(logits, temperature).items():
                longer[(*tokens, token)] = p * q
        probs = longer
    assert len(probs) > 15
    uniforms = numbers(pairs(1, count), 3)
    for factor in (1, 1.15):
        s = grpo.generate(model, [prompt], uniforms, temperature * factor)
        counts = Counter(tuple(ended(s, row)[0]) for row in range(count))
        assert agrees(counts, probs) == (factor == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_impossible_is_drawn(dtype):
    """Neither by the smallest nor by the largest number, first, last or in between."""
    generator = torch.Generator().manual_seed(0)
    largest = BELOW_1 if dtype == torch.float32 else 1 - 2**-53
    for vocab, scale in ((5, 1.0), (300, 5.0), (5000, 0.1), (5000, 40.0)):
        logits = (torch.randn(60, vocab, generator=generator) * scale).to(dtype)
        logits[:20, :2] = logits[20:40, -2:] = logits[10:60:7, 2] = -torch.inf
        for u in (0.0, 1e-30, 0.5, largest):
            tokens = grpo.draw(logits.softmax(-1), torch.full((60, 1), u, dtype=dtype))
            assert (logits.softmax(-1).gather(1, tokens) > 0).all()


def test_draw_takes_the_first_token_above_the_number():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, -1)
    u = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, BELOW_1])[:, None]
    assert grpo.draw(probs, u)[:, 0].tolist() == [0, 0, 2, 2, 3, 3]
    assert grpo.draw(0.9 * probs, u)[:, 0].tolist() == [0, 0, 2, 2, 3, 3]  # sums to 0.9
    broken = torch.full((6, 4), torch.nan)  # rollout complains; until then ids stay ids
    assert (grpo.draw(broken, u) < 4).all()


# -------------------------------------------------------------------- log-probabilities returned


@pytest.mark.parametrize("banned", [(), (0, 20, 21, 22)], ids=["all", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_returned_logprobs_are_those_of_training(temperature, banned):
    model, prompts = make_model(eos=(3, 7), banned=banned).float(), make_prompts(4)
    s = grpo.generate(model, prompts, numbers(pairs(4, 3), 25), temperature)
    assert s.logprobs.dtype == torch.float32 and s.tokens.dtype == torch.long
    rows = [ended(s, row)[0] for row in range(12)]
    asked = [prompts[row // 3] for row in range(12)]
    whole = [prompt + own for prompt, own in zip(asked, rows, strict=True)]
    masks = [[0] * len(prompt) + [1] * len(own) for prompt, own in zip(asked, rows, strict=True)]
    tokens, mask = grpo.pad_rows(whole, CPU, torch.long), grpo.pad_rows(masks, CPU, torch.bool)
    logprobs, _ = grpo.completion_logprobs(model, tokens, mask, temperature)
    ours = torch.cat([s.logprobs[row, : len(own)] for row, own in enumerate(rows)])
    torch.testing.assert_close(logprobs[mask[:, 1:]], ours, atol=1e-4, rtol=0)
    assert not {token for row in rows for token in row} & set(banned)


def test_banned_ids():
    """Never sampled, whatever the number; training sees the same masked distribution."""
    banned = (0, 11, 21, 22)
    plain, model = make_model(), make_model(banned=banned)
    grid = torch.linspace(0, BELOW_1, 200)[:, None].expand(-1, 3)
    for temperature in (1.0, 3.0, 0.0):
        s = grpo.generate(model, [[5, 6]], grid, temperature)
        assert not set(s.tokens.flatten().tolist()) & set(banned)
        assert s.logprobs.isfinite().all()
    free = grpo.generate(plain, [[5, 6]], grid, temperature=3.0)
    assert set(free.tokens.flatten().tolist()) >= set(banned)
    tokens, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    logits = plain.lm_head(plain(tokens))[:, :-1]
    logits[..., list(banned)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    ours, entropy = grpo.completion_logprobs(model, tokens, mask)
    torch.testing.assert_close(ours, expected)
    unmasked, _ = grpo.completion_logprobs(plain, tokens, mask)
    trained = mask[:, 1:] == 1
    assert (ours - unmasked)[trained].abs().min() > 1e-3
    assert entropy.isfinite().all() and (entropy[trained] > 0).all()


# ------------------------------------------------------------------------------ where a row ends


def test_end_of_text():
    """Every id of the list ends a row; it is part of the row; before it all is as without."""
    prompts, steps = make_prompts(6), 33
    uniforms = numbers(pairs(6, 5), steps)
    free = grpo.generate(make_model(), prompts, uniforms)
    assert free.lengths.tolist() == [steps] * 30 and not free.finished.any()
    for eos in ((3,), (7, 3), (3, 7, 11, 2), tuple(range(V))):
        s = grpo.generate(make_model(eos=eos), prompts, uniforms)
        for row, tokens in enumerate(free.tokens.tolist()):
            first = next((i for i, token in enumerate(tokens) if token in eos), None)
            expected = (tokens, False) if first is None else (tokens[: first + 1], True)
            assert ended(s, row) == expected
    assert s.lengths.tolist() == [1] * 30  # every id ends the text


def test_end_of_text_as_the_last_token_allowed():
    uniforms = numbers([(0, 0)], 20)
    tokens = grpo.generate(make_model(), [[4, 5]], uniforms).tokens[0].tolist()
    first = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 3)
    for limit, finished in ((first, False), (first + 1, True), (first + 2, True)):
        s = grpo.generate(make_model(eos=(tokens[first],)), [[4, 5]], uniforms[:, :limit])
        assert ended(s, 0) == (tokens[: first + 1][:limit], finished)


PIECES = ["a", "b", "c", "ab", "bca", ".", "cc", "<e>"]  # some hold an end of a stop and more


def stopper(stops, pieces=PIECES):
    """Prompter.stop over these pieces, without a task."""
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="."))
    tokenizer.decoder = decoders.Fuse()
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    last = {word[-1] for word in stops}
    endings = {i for i, piece in enumerate(pieces) if last & set(piece)}
    holder = SimpleNamespace(stops=stops, endings=endings, decode=decode)
    return partial(grpo.Prompter.stop, holder)


def stopped(tokens, stops, eos=()):
    """Where a row ends, found token by token: (tokens, finished)."""
    for end in range(1, len(tokens) + 1):
        text = "".join(PIECES[token] for token in tokens[:end])
        if tokens[end - 1] in eos or any(word in text for word in stops):
            return tokens[:end], True
    return tokens, False


STOPS = [("ccab",), ("abca", "bbb"), (".c.",), ("bca.", "<e>"), ("never",), ("aaaa", "cabcab")]


@pytest.mark.parametrize("eos", [(), (5,)])
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 17, 29])
@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stop_strings(stops, steps, eos):
    """Looked for every few steps and at the very end, also in rows that ended in between."""
    prompts, uniforms = make_prompts(8, vocab=8), numbers(pairs(8, 8), steps)
    free = grpo.generate(make_model(vocab=8), prompts, uniforms, 2.0).tokens.tolist()
    s = grpo.generate(make_model(vocab=8, eos=eos), prompts, uniforms, 2.0, stopper(stops))
    assert [ended(s, row) for row in range(64)] == [stopped(row, stops, eos) for row in free]


@pytest.mark.parametrize("first, length", [(6, 3), (0, 20), (1, 31), (8, 8), (14, 5), (21, 8)])
def test_stop_string_that_spans_looks(first, length):
    """A stop string of up to 31 tokens, taken out of each row in turn."""
    uniforms, model = numbers(pairs(1, 6), 40), make_model(vocab=8)
    free = grpo.generate(model, [[1, 2]], uniforms, 2.0).tokens.tolist()
    for row in range(6):
        stops = ("".join(PIECES[token] for token in free[row][first : first + length]),)
        s = grpo.generate(model, [[1, 2]], uniforms, 2.0, stopper(stops))
        assert [ended(s, i) for i in range(6)] == [stopped(tokens, stops) for tokens in free]
        assert s.finished[row]


def test_stop_string_in_the_prompt_stops_nothing():
    model = make_model(vocab=8, banned=(5,))  # no "."
    s = grpo.generate(model, [[5, 5, 5, 5]], numbers([(0, 0)], 12), stop=stopper(("..",)))
    assert s.lengths.tolist() == [12] and not s.finished.any()


# ----------------------------------------------------------------------------- shapes and limits


def shapes_of(model):
    """A list that grows by (B, T) of each forward pass."""
    shapes = []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append((*inputs[0].shape,)))
    return shapes


def test_each_prompt_runs_once_and_finished_rows_leave():
    model, prompts = make_model(eos=(3, 7)), make_prompts(4)
    shapes = shapes_of(model)
    s = grpo.generate(model, prompts, numbers(pairs(4, 8), 60))
    assert shapes[0] == (4, max(map(len, prompts)))  # the group shares it
    assert all(length == 1 for _, length in shapes[1:])
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[0] <= 32
    assert sum(rows) < 1.5 * int(s.lengths.sum())  # little is computed for rows that have ended
    assert len(shapes) <= int(s.lengths.max())  # and nothing when all have


def test_a_row_that_stops_is_computed_no_further():
    model, stops = make_model(vocab=8), ("a", "b", "c")
    shapes = shapes_of(model)
    s = grpo.generate(model, [[1]], numbers(pairs(1, 9), 60), 2.0, stopper(stops))
    assert s.finished.all() and len(shapes) <= int(s.lengths.max()) + grpo.LOOK_EVERY


# -------------------------------------------------------------------------------- random numbers


def test_row_uniforms():
    np.random.seed(0)
    keys = list(product((0, 1, 2**31), (0, 1, 7), (0, 1, 2, 100000), (0, 1, 2, 15)))
    found = {key: grpo.row_uniforms(*key, 64) for key in keys}
    np.random.seed(1)
    for key in reversed(keys):  # another order, another global state
        again = grpo.row_uniforms(*key, 64)
        assert again.dtype == np.float32 and again.shape == (64,)
        assert (again == found[key]).all()
        assert (grpo.row_uniforms(*key, 20) == again[:20]).all()
    values = np.stack(list(found.values()))
    assert values.min() >= 0 and values.max() < 1
    assert len({row.tobytes() for row in values}) == len({row[0] for row in values}) == len(keys)


def test_row_uniforms_are_uniform_and_independent():
    values = np.stack([grpo.row_uniforms(0, 3, *row, 50) for row in pairs(20, 20)])
    bins = Counter((values.flatten() * 50).astype(int).tolist())
    assert agrees(bins, dict.fromkeys(range(50), 1 / 50))
    above, below = ((x * 7).astype(int).flatten().tolist() for x in (values[:-1], values[1:]))
    both = Counter(zip(above, below, strict=True))  # a row against the next
    assert agrees(both, dict.fromkeys(product(range(7), repeat=2), 1 / 49))


# ----------------------------------------------------------------------------- log-probabilities


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


def gradients(model, logprobs, weights):
    """Gradient of the weighted sum, all parameters in one vector."""
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def at_once(model, positions):
    """Let the head take this many positions at a time, as for a larger vocabulary."""
    model.config["vocab_size"] = 2**23 // positions


@pytest.mark.parametrize("positions", [2**20, 10, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_completion_logprobs(temperature, positions):
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()
    weights = torch.linspace(-1, 2, 55).view(5, 11)
    expected, entropy = naive(model, tokens, mask, temperature)
    gradient = gradients(model, expected, weights)
    at_once(model, positions)
    ours, our_entropy = grpo.completion_logprobs(model, tokens, mask, temperature)
    assert ours.shape == our_entropy.shape == (5, 11)
    assert not ours[~mask[:, 1:]].any() and not our_entropy[~mask[:, 1:]].any()
    close(ours, expected)
    close(our_entropy, entropy.detach())  # and has no gradient
    close(gradients(model, ours, weights), gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_and_neighbours_change_nothing(checkpointing):
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()

    def results(parts):
        model.zero_grad()
        found = []
        for tokens, mask in parts:
            logprobs, _ = grpo.completion_logprobs(model, tokens, mask, 0.8)
            logprobs.sum().backward()
            found.append(logprobs.detach()[:, :11])
        return torch.cat(found), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = results([(tokens, mask)])
    model.checkpointing = checkpointing
    nines, zeros = torch.full((5, 6), 9), torch.zeros(5, 6, dtype=torch.bool)
    layouts = {
        "whole": [(tokens, mask)],
        "alone": [(tokens[i : i + 1], mask[i : i + 1]) for i in range(5)],
        "pairs": [(tokens[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)],
        "padded": [(torch.cat([tokens, nines], 1), torch.cat([mask, zeros], 1))],
        "whole numbers as mask": [(tokens, mask.long())],
    }
    for parts in layouts.values():
        for ours, whole in zip(results(parts), expected, strict=True):
            close(ours, whole)


def test_checkpointing_computes_layers_again():
    model, (tokens, mask), calls = make_model().requires_grad_(), training_batch(), []
    model.model.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        model.checkpointing = checkpointing
        grpo.completion_logprobs(model, tokens, mask)[0].sum().backward()
        assert len(calls) == times


def test_nothing_to_train():
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()
    logprobs, entropy = grpo.completion_logprobs(model, tokens, torch.zeros_like(mask))
    assert logprobs.shape == entropy.shape == (5, 11) and not logprobs.any() and not entropy.any()
    logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class LargestLogits(TorchDispatchMode):
    """The number of elements of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.largest = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                *_, rows, last = tensor.shape
                if last == self.vocab and rows != HIDDEN:  # not the head's gradient, turned
                    self.largest = max(self.largest, tensor.numel())
        return out


def test_chunks_bound_the_logits():
    """Forward and backward, and only trained positions go through the head."""
    model, (tokens, mask) = make_model(vocab=101).requires_grad_(), training_batch(seed=2)
    trained = int(mask[:, 1:].sum())
    assert trained != HIDDEN
    for positions, expected in ((2**20, trained), (5, 5), (1, 1)):
        at_once(model, positions)
        with LargestLogits(101) as seen:
            grpo.completion_logprobs(model, tokens, mask)[0].sum().backward()
        assert seen.largest == expected * 101


# ------------------------------------------------------------------------------- batches of rows


def test_pad_rows():
    padded = grpo.pad_rows([[1, 2], [3], [], [4, 5, 6]], CPU, torch.long)
    assert padded.dtype == torch.long
    assert padded.tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 6]]
    assert grpo.pad_rows([[1], [0, 1]], CPU, torch.bool).tolist() == [[True, False], [False, True]]
    assert grpo.pad_rows([[0.5], [1.5, -2.0]], CPU, torch.float32).tolist() == [[0.5, 0], [1.5, -2]]


def test_micro_batches():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(0, 30))]
        budget = rng.choice((1, 20, 64, 100, 1000))
        batches = grpo.micro_batches(lengths, budget)
        assert sorted(sum(batches, [])) == list(range(len(lengths)))
        longest = [max(lengths[row] for row in batch) for batch in batches]
        # the largest batch first: memory shows at once; none ends before it is full
        assert longest == sorted(longest, reverse=True)
        for batch, length in zip(batches, longest, strict=True):
            assert len(batch) == 1 or len(batch) * length <= budget
            assert batch == batches[-1] or (len(batch) + 1) * length > budget


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_training_batches(world):
    """Each row on one rank, about as many tokens on each; prompts and padding are not trained."""
    rng = random.Random(world)
    lengths = [(rng.randint(1, 9), rng.randint(1, 20)) for _ in range(17)]
    done = [SimpleNamespace(prompt=[7] * p, tokens=[3] * n) for p, n in lengths]
    asked, found, loads = [i for i in range(17) if i not in (2, 11)], [], []
    for rank in range(world):
        cfg = SimpleNamespace(micro_batch_tokens=60)
        run = SimpleNamespace(cfg=cfg, device=CPU, rank=rank, world=world)
        batches = grpo.training_batches(run, done, asked)
        assert grpo.training_batches(run, done, []) == []
        loads.append(sum(sum(lengths[i]) for rows, _, _ in batches for i in rows))
        for rows, tokens, mask in batches:
            assert mask.dtype == torch.bool and tokens.shape == mask.shape
            assert len(rows) == 1 or tokens.numel() <= 60
            for row, ids, trained in zip(rows, tokens, mask, strict=True):
                p, n = lengths[row]
                assert ids.tolist() == [7] * p + [3] * n + [0] * (len(ids) - p - n)
                assert trained.tolist() == [False] * p + [True] * n + [False] * (len(ids) - p - n)
            found += rows
    assert sorted(found) == asked  # the union over ranks is all rows, each once
    assert max(loads) - min(loads) <= max(p + n for p, n in lengths)


# --------------------------------------------------------------------------- products by oneDNN


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 512)])
def test_product_of_onednn(shape, bias, monkeypatch):
    """F.linear's values, for large float32 layers on a CPU, and only without gradient."""
    torch.manual_seed(0)
    layer, small, x = grpo.Linear(512, 256, bias), grpo.Linear(512, 16, bias), torch.randn(shape)
    calls, linear = [], torch.nn.functional.linear

    def noted(*args):
        calls.append(args[0].dtype)
        return linear(*args)

    expected = linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), expected, atol=2e-4, rtol=0)
            assert calls == []
            small(x)
            layer(x.bfloat16())
            assert calls == [torch.float32, torch.bfloat16]
        calls.clear()
    layer(x).sum().backward()  # in training the gradient is torch's own
    assert calls == [torch.float32] and layer.weight.grad is not None
