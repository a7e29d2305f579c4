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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

V = 23  # vocabulary
BELOW_1 = 1 - 2**-24  # the largest float32 below 1
CPU = torch.device("cpu")


def make_model(vocab=V, eos=(), banned=(), seed=0, **changes):
    """A random model in float64; its distributions are far from uniform and from one token."""
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": 24}
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


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_batch_invariance(temperature):
    """Row by row as if it were alone, though rows leave the batch."""
    model, prompts, steps = make_model(eos=(3, 7)), make_prompts(5), 30
    rows, alone = pairs(5, 4), {}
    for row in rows:
        s = grpo.generate(model, [prompts[row[0]]], numbers([row], steps), temperature)
        alone[row] = ended(s, 0), s.logprobs[0, : s.lengths[0]]
    shuffled = random.Random(0).sample(rows, len(rows))
    few = [(p, s) for p in (1, 3) for s in (2, 0)]
    for layout, size in ((rows, 4), (rows[::-1], 4), (shuffled, 1), (few, 2)):
        asked = [prompts[p] for p, _ in layout[::size]]
        s = grpo.generate(model, asked, numbers(layout, steps), temperature)
        for row, key in enumerate(layout):
            expected, logprobs = alone[key]
            assert ended(s, row) == expected
            ours = s.logprobs[row, : len(logprobs)]
            torch.testing.assert_close(ours, logprobs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_generate_has_the_right_joint_distribution(temperature):
    """Three tokens of 20000 rows, against every sequence enumerated; token 4 ends a row."""
    model, prompt, count = make_model(vocab=6, eos=(4,), banned=(5,), seed=3), [1, 2, 0], 20000
    probs = {(): 1.0}
    for _ in range(3):
        longer = {tokens: p for tokens, p in probs.items() if 4 in tokens}
        for tokens, p in probs.items() - longer.items():
            logits = next_logits(model, prompt + list(tokens)).tolist()
            weights = [math.exp((x - max(logits)) / temperature) for x in logits]
            for token, weight in enumerate(weights[:5]):
                longer[(*tokens, token)] = p * weight / sum(weights)
        probs = longer
    common = [tokens for tokens, p in probs.items() if p * count > 8]
    s = grpo.generate(model, [prompt], numbers(pairs(1, count), 3), temperature)
    seen = Counter(tuple(ended(s, row)[0]) for row in range(count))
    assert seen.keys() <= probs.keys()
    expected = {tokens: probs[tokens] * count for tokens in common}
    chi = sum((seen[tokens] - n) ** 2 / n for tokens, n in expected.items())
    assert chi < len(common) + 4 * math.sqrt(2 * len(common))  # four deviations above its mean


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


@pytest.mark.parametrize("banned", [(), (0, 20, 21, 22)], ids=["all", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_returned_logprobs_are_those_of_training(temperature, banned):
    model, prompts = make_model(eos=(3, 7), banned=banned).float(), make_prompts(4)
    s = grpo.generate(model, prompts, numbers(pairs(4, 3), 25), temperature)
    assert s.logprobs.dtype == torch.float32 and s.tokens.dtype == torch.long
    rows = [(prompts[row // 3], ended(s, row)[0]) for row in range(12)]
    masks = [[0] * len(prompt) + [1] * len(own) for prompt, own in rows]
    mask = grpo.pad_rows(masks, CPU, torch.bool)
    tokens = grpo.pad_rows([prompt + own for prompt, own in rows], CPU, torch.long)
    logprobs, _ = grpo.completion_logprobs(model, tokens, mask, temperature)
    ours = torch.cat([s.logprobs[row, : len(own)] for row, (_, own) in enumerate(rows)])
    torch.testing.assert_close(logprobs[mask[:, 1:]], ours, atol=1e-4, rtol=0)
    assert not {token for _, own in rows for token in own} & set(banned)


def test_greedy_tokens_are_the_best_that_are_not_banned():
    model, text = make_model(banned=(0, 11, 21, 22)), [5, 6]
    tokens = grpo.generate(model, [text], torch.zeros(1, 9), 0.0).tokens[0].tolist()
    for token in tokens:
        assert next_logits(model, text)[token] == next_logits(model, text).max() > -math.inf
        text = [*text, token]


def test_end_of_text():
    """Every id of the list ends a row; it is part of the row; before it all is as without."""
    prompts, uniforms = make_prompts(6), numbers(pairs(6, 5), 33)
    free = grpo.generate(make_model(), prompts, uniforms)
    assert free.lengths.tolist() == [33] * 30 and not free.finished.any()
    for eos in ((3,), (7, 3), (3, 7, 11, 2), tuple(range(V))):
        s = grpo.generate(make_model(eos=eos), prompts, uniforms)
        for row, tokens in enumerate(free.tokens.tolist()):
            first = next((i for i, token in enumerate(tokens) if token in eos), None)
            expected = (tokens, False) if first is None else (tokens[: first + 1], True)
            assert ended(s, row) == expected
    assert s.lengths.tolist() == [1] * 30  # every id ends the text


PIECES = ["a", "b", "c", "ab", "bca", ".", "cc", "<e>"]  # some hold an end of a stop and more


def stopper(stops, pieces=PIECES):
    """Prompter.stop over these pieces, without a task."""
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="."))
    tokenizer.decoder = decoders.Fuse()
    last = {word[-1] for word in stops}
    endings = {i for i, piece in enumerate(pieces) if last & set(piece)}
    holder = SimpleNamespace(stops=stops, endings=endings, decode=tokenizer.decode)
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
@pytest.mark.parametrize("steps", [1, 8, 9, 29])
@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stop_strings(stops, steps, eos):
    """Looked for every few steps and at the very end, also in rows that ended in between."""
    prompts, uniforms = make_prompts(8, vocab=8), numbers(pairs(8, 8), steps)
    free = grpo.generate(make_model(vocab=8), prompts, uniforms, 2.0).tokens.tolist()
    s = grpo.generate(make_model(vocab=8, eos=eos), prompts, uniforms, 2.0, stopper(stops))
    assert [ended(s, row) for row in range(64)] == [stopped(row, stops, eos) for row in free]


@pytest.mark.parametrize("first, length", [(6, 3), (0, 20), (1, 31), (8, 8)])
def test_stop_string_that_spans_looks(first, length):
    """A stop string of up to 31 tokens, taken out of each row in turn."""
    uniforms, model = numbers(pairs(1, 6), 40), make_model(vocab=8)
    free = grpo.generate(model, [[1, 2]], uniforms, 2.0).tokens.tolist()
    for row in range(6):
        stops = ("".join(PIECES[token] for token in free[row][first : first + length]),)
        s = grpo.generate(model, [[1, 2]], uniforms, 2.0, stopper(stops))
        assert [ended(s, i) for i in range(6)] == [stopped(tokens, stops) for tokens in free]


def test_only_rows_that_may_end_are_decoded():
    """A new token holds the last letter of a stop string, as the second of two letters, too."""
    tokenizer = Tokenizer(models.WordLevel({"a>": 0, "b": 1, ":c": 2, "<d": 3}, unk_token="b"))
    prompter = grpo.Prompter(SimpleNamespace(tokenizer=tokenizer, is_tiny=False), None, False)
    assert prompter.stops == ("</answer>", "\nUser:") and prompter.endings == {0, 2}
    decoded, prompter.decode = [], lambda ids: decoded.append(list(ids)) or ""
    tokens = torch.tensor([[1, 3, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
    lengths, finished = torch.tensor([6, 6, 5]), torch.zeros(3, dtype=torch.bool)
    prompter.stop(SimpleNamespace(tokens=tokens, lengths=lengths, finished=finished), 2)
    assert decoded == [[1, 3, 1, 0], [0, 0, 1, 1, 2]]  # new and before the row's end
    assert not finished.any() and lengths.tolist() == [6, 6, 5]


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
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and sum(rows) < 1.5 * int(s.lengths.sum())
    assert len(shapes) <= int(s.lengths.max())  # nothing is computed when all have ended
    model = make_model(vocab=8)
    shapes = shapes_of(model)
    s = grpo.generate(model, [[1]], numbers(pairs(1, 9), 60), 2.0, stopper(("a", "b", "c")))
    assert s.finished.all() and len(shapes) <= int(s.lengths.max()) + grpo.LOOK_EVERY


def test_row_uniforms():
    """Of seed, step, prompt and sample alone; a longer row begins with the shorter one."""
    keys = list(product((0, 1, 2**31), (0, 1, 7), (0, 1, 2, 100000), (0, 1, 2, 15)))
    values = np.stack([grpo.row_uniforms(*key, 64) for key in keys])
    for key, row in zip(reversed(keys), reversed(values), strict=True):
        again = grpo.row_uniforms(*key, 20)
        assert again.dtype == np.float32 and (again == row[:20]).all()
    assert values.min() >= 0 and values.max() < 1
    assert len({row[0] for row in values}) == len(keys)


def training_batch(seed=0):
    """Tokens (5, 12) and a mask with holes; one row trains nothing."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, V - 1, (5, 12), generator=generator)  # 0 and 22 may be banned
    mask = torch.rand(5, 12, generator=generator) < 0.6
    mask[2] = False
    return tokens, mask


def naive(model, tokens, mask, temperature):
    """Every logit at once, by log_softmax."""
    logits = model.lm_head(model(tokens))[:, :-1] + model.vocab_bias
    logprobs = (logits / temperature).log_softmax(-1)  # (B, T-1, V)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    trained = mask[:, 1:].to(logprobs.dtype)
    return logprobs.gather(-1, tokens[:, 1:, None])[..., 0] * trained, entropy * trained


def gradients(model, logprobs, weights):
    """Gradient of the weighted sum, all parameters in one vector."""
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("positions", [2**20, 10, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_completion_logprobs(temperature, positions):
    """Only trained positions go through the head, so many at a time; again going backward."""
    model, (tokens, mask) = make_model(banned=(0, 22)).requires_grad_(), training_batch()
    weights, sizes, logits = torch.linspace(-1, 2, 55).view(5, 11), [], model.logits
    expected, entropy = naive(model, tokens, mask, temperature)
    gradient = gradients(model, expected, weights)
    model.config["vocab_size"] = 2**23 // positions  # as for a larger vocabulary
    model.logits = lambda hidden, t: sizes.append(len(hidden)) or logits(hidden, t)
    ours, our_entropy = grpo.completion_logprobs(model, tokens, mask, temperature)
    assert sum(sizes) == mask[:, 1:].sum() and max(sizes) <= positions
    close(ours, expected)
    close(our_entropy, entropy.detach())  # and has no gradient
    close(gradients(model, ours, weights), gradient)
    assert sum(sizes) == mask[:, 1:].sum() * (1 if positions == 2**20 else 2)
    nothing, _ = grpo.completion_logprobs(model, tokens, torch.zeros_like(mask))
    assert nothing.shape == (5, 11) and not gradients(model, nothing, weights).any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_and_neighbours_change_nothing(checkpointing):
    model, (tokens, mask) = make_model().requires_grad_(), training_batch()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))

    def results(parts):
        model.zero_grad()
        found = [grpo.completion_logprobs(model, *part, 0.8)[0][:, :11] for part in parts]
        torch.cat(found).sum().backward()
        return torch.cat([*(x.detach().flatten() for x in found), *(p.grad.flatten() for p in ws)])

    ws = list(model.parameters())
    expected = results([(tokens, mask)])
    model.checkpointing = checkpointing
    nines, zeros = torch.full((5, 6), 9), torch.zeros(5, 6, dtype=torch.bool)
    close(results([(tokens[i : i + 1], mask[i : i + 1]) for i in range(5)]), expected)
    close(results([(tokens[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]), expected)
    calls.clear()
    close(results([(torch.cat([tokens, nines], 1), torch.cat([mask, zeros], 1))]), expected)
    assert len(calls) == 1 + checkpointing  # layers are computed again


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
        assert longest == sorted(longest, reverse=True)  # memory shows at once
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
            assert len(rows) == 1 or tokens.numel() <= 60
            for row, ids, trained in zip(rows, tokens, mask, strict=True):
                (p, n), rest = lengths[row], len(ids) - sum(lengths[row])
                assert ids.tolist() == [7] * p + [3] * n + [0] * rest
                assert trained.tolist() == [False] * p + [True] * n + [False] * rest
            found += rows
    assert sorted(found) == asked  # the union over ranks is all rows, each once
    assert max(loads) - min(loads) <= max(p + n for p, n in lengths)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
def test_product_of_onednn(bias, monkeypatch):
    """F.linear's values, for large float32 layers on a CPU, and only without gradient."""
    layer, x, calls = grpo.Linear(512, 256, bias), torch.randn(2, 3, 512), []
    expected, linear = layer(x), torch.nn.functional.linear
    monkeypatch.setattr(grpo.F, "linear", lambda *args: calls.append(1) or linear(*args))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, atol=2e-4, rtol=0)
        assert calls == []
        layer(x.bfloat16())
    layer(x).sum().backward()
    assert calls == [1, 1] and layer.weight.grad is not None
