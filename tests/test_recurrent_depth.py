"""recurrent_depth.py: the reference's numbers (vectors/latent.json), caches, exits, its runs."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VECTORS, vectors
from safetensors.torch import load_file
from test_vectors import cases

import recurrent_depth as rd

CASE = vectors("latent")["recurrent_depth"]["instances"]["a"]
TENSORS = load_file(VECTORS / "latent.safetensors")
LAYERS = "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"
SIZES = {"n_embd": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 11}
SIZES |= {"norm_eps": 1e-6, "rope_base": 50000, "mean_recurrence": 4}


def make(*shape: int) -> tuple["rd.Model", torch.Tensor, torch.Tensor]:
    """A new model, tokens (2, 4), initial states."""
    model = rd.Model(SIZES | dict(zip(LAYERS, shape, strict=True)))
    rd.initialise(model, 0)
    tokens = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(3))
    return model, tokens, rd.initial_state(model, 2, 4, (5,))


def close(a, b, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The reference's tiny model, written as a published folder and read by load_model."""
    c, folder = CASE["config"], tmp_path_factory.mktemp("published")
    names = {"n_embd": "d_model", "num_attention_heads": "n_heads", "vocab_size": "vocab"}
    names |= {"intermediate_size": "mlp_hidden", "norm_eps": "norm_eps", "rope_base": "rope_base"}
    names |= dict(zip(LAYERS, ("n_prelude", "n_core", "n_coda"), strict=True))
    names |= {"tie_embeddings": "tied", "bias": "linear_bias"}
    config = {ours: c[theirs] for ours, theirs in names.items()}
    config |= {"model_type": "huginn_raven", "mean_recurrence": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {n.removeprefix("rd_a."): t for n, t in TENSORS.items() if "rd_a.transformer." in n}
    tensors["freqs_cis"] = torch.zeros(3)  # the published file has such a table
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    rd.save_file(tensors, folder / "model.safetensors")
    return rd.load_model(folder)


def tokens_and_state() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(CASE["input_ids"]), TENSORS["rd_a.input_s0"]


def reference_loss(logits: torch.Tensor) -> torch.Tensor:
    """The vectors' labels stand at the position that predicts them."""
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(CASE["labels"]).flatten())


@pytest.mark.parametrize("r", [1, 2, 4, 8, 64])
def test_eq1_to_eq5_logits_equal_the_reference(published, r):
    case, (tokens, state) = CASE["r"][str(r)], tokens_and_state()
    with torch.no_grad():
        hidden, state = published(tokens, r, state)
        logits, after = published.logits(hidden), published.transformer["ln_f"](state)
    if r < 64:
        close(logits, TENSORS[f"rd_a.logits_r{r}"], 1e-4)
    close(logits[:, -1, :8], case["logits_last_first8"], 1e-4)
    close(after[:, -1, :8], case["latent_first8"], 1e-4)  # returned there behind the norm
    assert reference_loss(logits).item() == pytest.approx(case["loss"], abs=1e-4)


def test_eq8_exit_series_equals_the_reference(published):
    """`recur` stops at the first step whose KL there is below the threshold, not before."""
    tokens, state = (x[:1] for x in tokens_and_state())
    series = CASE["exit_metrics_row0"]["kl_prev_to_cur"]
    for step in range(1, 8):  # below 1e-4 the series is rounding noise of float32
        below, above = series[step - 1] * 1.001, series[step - 1] * 0.999
        assert all(kl > below for kl in series[: step - 1])
        taken = []
        for kl in (below, above):
            cache = rd.Cache(published, 1, 9, 24)
            taken.append(rd.recur(published, tokens, state, cache, 24, kl)[2].item())
        assert taken[0] == step < taken[1]


@pytest.mark.parametrize("name, budget", [("full", 6), ("budget2", 2)])
def test_cached_decoding_equals_the_reference(published, name, budget):
    """Row 0: all but the last token in one pass, then the last one, at r = 6."""
    case = CASE["decode_r6_row0"]
    tokens, state = (x[:1] for x in tokens_and_state())
    cache = rd.Cache(published, 1, 9, budget)
    rd.recur(published, tokens[:, :-1], state[:, :-1], cache, 6)
    logits = rd.recur(published, tokens[:, -1:], state[:, -1:], cache, 6)[0][0, -1]
    close(logits, case[name], 1e-4)
    assert len(cache.keys) == case[f"{name}_n_slots"]


@pytest.mark.parametrize("grads, k", [("grad_norm_truncated", 2), ("grad_norm_full", 5)])
def test_eq7_truncated_backprop_equals_the_reference(published, grads, k):
    case = CASE["truncated_bptt"]
    published.zero_grad()
    tokens, state = tokens_and_state()
    loss = reference_loss(published.logits(published(tokens, 5, state, k)[0]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    ours = {name: weight.grad.norm().item() for name, weight in published.named_parameters()}
    assert ours == pytest.approx(case[grads], rel=1e-3)


def test_initial_weights_have_the_reference_spread(published):
    model = rd.Model(published.config)
    rd.initialise(model, 0)
    weights = dict(model.named_parameters())
    for name, std in CASE["init_std_before_perturbation"].items():
        if name in weights:
            assert weights[name].std().item() == pytest.approx(std, rel=0.07, abs=1e-9), name
    limit = 3 * math.sqrt(2 / 5 / model.config["n_embd"])
    assert max(w.abs().max() for w in weights.values() if w.ndim == 2) <= limit


@cases("latent", "recurrent_depth", "iteration_sampler", "stats")
def test_eq6_iteration_sampler_equals_the_reference(case):
    mean, backprop = case["mean_recurrence"], case["mean_backprop_depth"]
    rng = np.random.default_rng(0)
    drawn = np.array([rd.draw_steps(mean, backprop, rng) for _ in range(20_000)])
    assert drawn[:, 1].max() <= backprop and drawn.sum(1).min() >= 1
    for name, found in (("total", drawn.sum(1)), ("no_grad", drawn[:, 0])):
        assert found.mean() == pytest.approx(case[name]["mean"], rel=0.03)
        assert found.std() == pytest.approx(case[name]["std"], rel=0.05, abs=0.02)
        assert np.median(found) == pytest.approx(case[name]["median"], abs=1)
    assert (drawn.sum(1) < backprop).mean() == pytest.approx(case["frac_total_below_k"], abs=0.02)


def test_eq2_initial_state():
    model, _, _ = make(1, 1, 1)
    state, cut = rd.initial_state(model, 200, 10, (1, 2, 3)), 3 * math.sqrt(2 / 5)
    assert state.shape == (200, 10, 64) and state.abs().max() <= cut
    assert 0.62 < state.std() < 0.63 and abs(state.mean()) < 0.005
    assert torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 3)))
    assert not torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 4)))


class LatestCache:
    """The reference's lookup: a token that stopped early is read at its deepest iteration."""

    budget, length, thinking = 10**6, 0, None

    def __init__(self, model):
        c = model.config
        self.loop, self.entries = c["n_layers_in_recurrent_block"], defaultdict(dict)
        self.before = c["n_layers_in_prelude"] + c["n_layers_in_coda"]

    def append(self, slot, k, v):
        i, layer = divmod(slot - self.before, self.loop) if slot >= self.before else (0, slot - 100)
        self.entries[layer, self.length][i] = k[:, :, 0], v[:, :, 0]
        held = [self.entries[layer, t] for t in range(self.length + 1)]
        found = [have[max(j for j in have if j <= i)] for have in held]
        return tuple(torch.stack(x, 2) for x in zip(*found, strict=True))

    def advance(self, count, steps):
        self.length += count


@pytest.mark.parametrize("exit_kl", [0.0, 3e-3])
def test_eq8_stream_equals_a_naive_cache(exit_kl):
    """Rows with their own exits, against one row at a time with the reference's lookup."""
    model, tokens, states = make(2, 3, 1)
    logits, taken = rd.stream(model, tokens, states, 12, exit_kl)
    assert (taken[0] != taken[1]).any() if exit_kl else (taken == 12).all()
    for row in range(2):
        cache = LatestCache(model)
        for t in range(4):
            place = slice(row, row + 1), slice(t, t + 1)
            out, _, steps = rd.recur(model, tokens[place], states[place], cache, 12, exit_kl)
            close(out[0, 0], logits[row, t], 1e-4)
            assert steps.item() == taken[row, t]


def test_eq7_loss():
    """A sum over the labels there are, over num_labels."""
    model, tokens, states = make(1, 1, 1)
    logprobs = model.logits(model(tokens, 3, states)[0]).log_softmax(-1)
    best, labels = logprobs.max(-1)  # all labels are right
    labels[:, 0] = -100
    loss, seen = rd.depth_loss(model, tokens, labels, states, 1, 2, 6)
    close(loss, -best[:, 1:].sum() / 6)
    assert seen["accuracy"] == 1
    for n, k in ((3, 0), (2, 1)):  # k of them carry gradient
        model.zero_grad(set_to_none=True)
        rd.depth_loss(model, tokens, labels, states, n, k, 6)[0].backward()
        assert (model.transformer.adapter.weight.grad is None) == (k == 0)


def test_text(run, cwd):
    """Characters are the vocabulary; the last tenth is held out; labels are the next tokens."""
    text = "to be or not to be, that is the question. " * 20
    (cwd / "text.txt").write_text(text, encoding="utf-8")
    flags = "--task text --data text.txt --length 16 --eval_problems 0 --out a"
    assert run("recurrent_depth", flags).code == 0
    cfg = rd.Config(task="text", data="text.txt", length=16)
    prompter = rd.Prompter(rd.load_model(cwd / "a" / "step-000002"), cfg, text)
    task = prompter.task
    assert 0 not in task.ids and prompter.decode(prompter.encode("be, or not")) == "be, or not"
    inputs, labels = prompter.row(task.problem("train", 0, 0))
    assert len(inputs) == 16 and inputs[1:] == labels[:-1]
    held, found = task.ids[task.border :], {str(task.problem("test", 0, i)) for i in range(99)}
    assert len(held) == 84 and found == {str({"ids": held[i : i + 17]}) for i in range(0, 68, 16)}


