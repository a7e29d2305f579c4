"""recurrent_depth.py: the reference's numbers (vectors/latent.json), caches, exits, its runs."""

import importlib.util
import json
import math
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VECTORS, lines_of, metrics_of, vectors
from safetensors.torch import load_file

import recurrent_depth as rd

TOOL = ROOT / "docs" / "experiments" / "recurrent_depth.py"
spec = importlib.util.spec_from_file_location("shortcuts", TOOL)
tool = sys.modules["shortcuts"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

CASES = vectors("latent").get("recurrent_depth", {})
CASE = CASES.get("instances", {}).get("a", {})
TENSORS = load_file(VECTORS / "latent.safetensors") if CASE else {}
reference = pytest.mark.skipif(not CASE, reason="tests/vectors/latent.json is not there")
LAYERS = "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"
SIZES = {"n_embd": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 11}
SIZES |= {"norm_eps": 1e-6, "rope_base": 50000, "mean_recurrence": 4}


def make(*shape: int, **sizes) -> "rd.Model":
    """A model with the initial weights of the script, and biases that are not 0."""
    model = rd.Model(SIZES | dict(zip(LAYERS, shape or (1, 1, 1), strict=True)) | sizes)
    rd.initialise(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qk_bias"):
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


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
    model = rd.load_model(folder)
    return model


def tokens_and_state() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(CASE["input_ids"]), TENSORS["rd_a.input_s0"]


def reference_loss(logits: torch.Tensor) -> torch.Tensor:
    """The vectors' labels stand at the position that predicts them."""
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(CASE["labels"]).flatten())


@reference
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


@reference
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


@reference
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


@reference
@pytest.mark.parametrize("grads, k", [("grad_norm_truncated", 2), ("grad_norm_full", 5)])
def test_eq7_truncated_backprop_equals_the_reference(published, grads, k):
    case = CASE["truncated_bptt"]
    assert (case["no_grad"], case["with_grad"], case["total_steps"]) == (3, 2, 5)
    published.zero_grad()
    tokens, state = tokens_and_state()
    loss = reference_loss(published.logits(published(tokens, 5, state, k)[0]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    ours = {name: weight.grad.norm().item() for name, weight in published.named_parameters()}
    assert ours.keys() == case[grads].keys()
    for name, norm in case[grads].items():
        assert ours[name] == pytest.approx(norm, rel=1e-3), name


@reference
def test_initial_weights_have_the_reference_spread():
    c = CASE["config"]
    sizes = {"n_embd": c["d_model"], "intermediate_size": c["mlp_hidden"], "vocab_size": c["vocab"]}
    layers = dict(zip(LAYERS, (c["n_prelude"], c["n_core"], c["n_coda"]), strict=True))
    model = rd.Model(SIZES | layers | sizes)
    rd.initialise(model, 0)
    weights = dict(model.named_parameters())
    for name, std in CASE["init_std_before_perturbation"].items():
        if name in weights:
            assert weights[name].std().item() == pytest.approx(std, rel=0.07, abs=1e-9), name
    limit = 3 * math.sqrt(2 / 5 / c["d_model"])
    assert max(w.abs().max() for w in weights.values() if w.ndim == 2) <= limit


@pytest.mark.parametrize("case", CASES.get("iteration_sampler", {}).get("stats", []))
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


def some(model, rows: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(3))
    return tokens, rd.initial_state(model, rows, length, (5,))


def test_eq2_initial_state():
    model = make()
    state, cut = rd.initial_state(model, 200, 10, (1, 2, 3)), 3 * math.sqrt(2 / 5)
    assert state.shape == (200, 10, 64) and state.abs().max() <= cut
    assert 0.62 < state.std() < 0.63 and abs(state.mean()) < 0.005
    assert torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 3)))
    assert not torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 4)))


def test_checkpointing_changes_no_gradient():
    model, found = make(2, 2, 1), []
    tokens, state = some(model)
    for model.checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        model.logits(model(tokens, 4, state, 2)[0]).logsumexp(-1).sum().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.equal(*found)


class LatestCache:
    """The reference's lookup: a token that stopped early is read at its deepest iteration."""

    def __init__(self, model, budget: int):
        c = model.config
        self.loop, self.budget, self.length = c["n_layers_in_recurrent_block"], 10**6, 0
        self.before, self.shared = c["n_layers_in_prelude"] + c["n_layers_in_coda"], budget
        self.entries, self.thinking = defaultdict(dict), None

    def append(self, slot, k, v):
        i, layer = divmod(slot - self.before, self.loop) if slot >= self.before else (0, slot - 100)
        i = i % self.shared
        found = []
        for t in range(k.shape[2]):
            self.entries[layer, self.length + t][i] = k[:, :, t], v[:, :, t]
        for t in range(self.length + k.shape[2]):
            have = self.entries[layer, t]
            found.append(have[max(j for j in have if j <= i)])
        return tuple(torch.stack(x, 2) for x in zip(*found, strict=True))

    def advance(self, count, steps):
        self.length += count


@pytest.mark.parametrize("exit_kl", [0.0, 3e-3])
@pytest.mark.parametrize("warm, budget", [(False, 1), (False, 12), (True, 3)])
def test_eq8_stream_equals_a_naive_cache(budget, exit_kl, warm):
    """Rows with their own exits, against one row at a time with the reference's lookup."""
    model = make(2, 3, 1)
    tokens, states = some(model, rows=2, length=5)
    logits, taken = tool.stream(model, tokens, states, 12, exit_kl, budget, warm)
    if exit_kl:
        assert len(taken.unique()) > 2 and (taken[0] != taken[1]).any(), "too easy a case"
    else:
        assert (taken == 12).all()
    for row in range(2):
        cache, state = LatestCache(model, budget), states[row : row + 1, :1]
        for t in range(5):
            state = state if warm else states[row : row + 1, t : t + 1]
            token = tokens[row : row + 1, t : t + 1]
            out, state, steps = rd.recur(model, token, state, cache, 12, exit_kl)
            close(out[0, 0], logits[row, t], 1e-4)
            assert steps.item() == taken[row, t]
    if budget == 12:  # the script's own, which is never warm
        again = rd.stream(model, tokens, states, 12, exit_kl)
        assert torch.equal(again[0], logits) and torch.equal(again[1], taken)


@pytest.mark.parametrize("draft, lookahead", [(1, 0), (1, 3), (2, 20), (6, 3)])
def test_speculation_writes_the_same(lookahead, draft):
    """Greedy decoding with all iterations, computed anew for each token."""
    model = make(1, 2, 1)
    tokens, states = some(model, rows=1, length=14)
    row = tokens[:, :4]
    for _ in range(11):
        chosen = model.logits(model(row, 6, states[:, : row.shape[1]])[0])[:, -1:].argmax(-1)
        row = torch.cat([row, chosen], 1)
    new, iterations, passes = tool.speculate(model, tokens[:, :4], states, 6, draft, lookahead)
    assert new == row[0, 4:].tolist() and len(new) == 11
    assert passes <= 11 and (lookahead > 0 or iterations == 66)
    if draft == 6:  # drafts of the full model are all accepted: lookahead + 1 tokens a pass
        assert passes == 1 + math.ceil(10 / (lookahead + 1))


def test_eq7_loss_and_the_correlation_of_states():
    """A sum over the labels there are, over num_labels; two equal states have correlation 1."""
    model = make()
    tokens, states = some(model, rows=2, length=4)
    logprobs = model.logits(model(tokens, 3, states)[0]).log_softmax(-1)
    best, labels = logprobs.max(-1)  # all labels are right
    labels[:, 0] = -100
    loss, seen = rd.depth_loss(model, tokens, labels, states, 1, 2, 6)
    close(loss, -best[:, 1:].sum() / 6)
    parts = zip(tokens.split(1), labels.split(1), states.split(1), strict=True)
    halves = [rd.depth_loss(model, *part, 1, 2, 6) for part in parts]
    close(loss, halves[0][0] + halves[1][0])
    assert seen["accuracy"] == 1 and halves[0][1]["accuracy"] == 0.5
    for n, k in ((3, 0), (2, 1)):  # k of them carry gradient
        model.zero_grad(set_to_none=True)
        rd.depth_loss(model, tokens, labels, states, n, k, 6)[0].backward()
        assert (model.transformer.adapter.weight.grad is None) == (k == 0)
    state = model(tokens, 3, states)[1].detach().numpy()
    tables = [np.corrcoef(state[b]) for b in range(2)]  # 1 on the diagonal
    assert seen["state_correlation"].item() == pytest.approx((np.sum(tables) - 8) / 24, abs=1e-5)


def test_what_a_run_logs(run, cwd):
    assert run("recurrent_depth", "--out a --steps 1").code == 0
    (step,), (after, _) = metrics_of(cwd / "a"), metrics_of(cwd / "a", True)
    assert step["tokens"] == 88
    assert after["eval/accuracy"] == after["eval/accuracy@4"]
    assert after["eval/iterations/full"] == 4 >= after["eval/iterations/exit"] >= 1
    # with all iterations and a full cache, reading token by token is reading at once
    assert after["eval/loss/full"] == pytest.approx(after["eval/loss@4"], abs=1e-5)


def test_eq6_each_micro_batch_draws_its_r(run, cwd):
    flags = "--micro_batch_tokens 44 --steps 1 --eval_problems 0 --out a"
    assert run("recurrent_depth", flags).code == 0
    drawn = [sum(rd.draw_steps(4, 4, np.random.default_rng((0, 1, m)))) for m in range(2)]
    assert metrics_of(cwd / "a")[0]["recurrences"] == sum(drawn) / 2


def test_text(run, cwd):
    """Characters are the vocabulary; the last tenth is held out; labels are the next tokens."""
    text = "to be or not to be, that is the question. " * 20
    (cwd / "text.txt").write_text(text, encoding="utf-8")
    flags = "--task text --data text.txt --length 16 --eval_problems 0 --out a"
    assert run("recurrent_depth", flags).code == 0
    cfg = rd.Config(task="text", data="text.txt", length=16)
    prompter = rd.Prompter(rd.load_model(cwd / "a" / "step-000002"), cfg, text)
    assert prompter.decode(prompter.encode("be, or not")) == "be, or not"
    task = prompter.task
    inputs, labels = prompter.row(task.problem("train", 0, 0))
    assert len(inputs) == 16 and inputs[1:] == labels[:-1]
    train, test = (
        {tuple(task.problem(split, 0, i)["ids"]) for i in range(99)} for split in ("train", "test")
    )
    held = task.ids[task.border :]
    assert 0 not in task.ids and len(held) == 84 and all(len(ids) == 17 for ids in train)
    assert test == {tuple(held[i : i + 17]) for i in range(0, len(held) - 16, 16)}


def test_bfloat16(run, cwd, monkeypatch):
    """What a GPU does: float32 weights, products in bfloat16, a bfloat16 copy to evaluate."""
    init = rd.Run.__init__

    def half(self, cfg):
        init(self, cfg)
        self.dtype = torch.bfloat16

    assert run("recurrent_depth", "--steps 1 --out b").code == 0
    monkeypatch.setattr(rd.Run, "__init__", half)
    assert run("recurrent_depth", "--steps 1 --out a").code == 0
    a, b = (metrics_of(cwd / name)[0]["loss"] for name in "ab")
    assert a != b and a == pytest.approx(b, rel=0.02)
    tensors = load_file(cwd / "a" / "step-000001" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in tensors.values())


def test_the_other_shortcuts(cwd):
    """The tool's full and exit are the script's; sizes of caches by hand."""
    rd.make_model(cwd / "m", rd.Config(hidden_size=16, num_heads=2), "")
    flags = "--task s3:elements=10 --eval_problems 3 --eval_samples 1 --test_r 4"
    flags += " --max_new_tokens 3 --model m --out b"
    assert rd.main(tool.solve, tool.Config, flags.split()) == 0
    first, found = metrics_of(cwd / "b", True)
    assert first.items() < found.items()
    assert found["eval/cache/full"] == found["eval/cache/exit"] == 2 * 16 * (1 + 4 + 1)
    assert found["eval/cache/shared"] == found["eval/cache/both"] == 2 * 16 * (1 + 1 + 1)
    assert found["eval/iterations/shared"] == 4 and found["eval/same"] == 1
    assert found["eval/iterations/greedy"] == 4 and found["eval/passes/greedy"] == 1


DAMAGE = [
    ("model_type", "qwen2", "'model_type': 'qwen2'"),
    ("num_key_value_heads", 1, "'num_key_value_heads': 1"),
    ("n_embd", None, "n_embd"),
    ("n_layers_in_coda", 1.5, "float"),
    ("vocab_size", 9, "wte.weight"),
    ("n_layers_in_prelude", 0, "transformer.prelude.0"),
]


@pytest.mark.parametrize("name, value, message", DAMAGE)
def test_bad_folders(cwd, name, value, message):
    rd.make_model(cwd / "a", rd.Config(hidden_size=16, num_heads=2), "")
    config = rd.read_json(cwd / "a" / "config.json") | {name: value}
    config = {n: v for n, v in config.items() if v is not None}
    (cwd / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(rd.BadInput) as error:
        rd.load_model(cwd / "a")
    said = str(error.value)
    assert message in said and str(cwd / "a") in said and "\n" not in said


def test_a_folder_with_two_tables_is_refused(cwd):
    rd.make_model(cwd, rd.Config(hidden_size=16, num_heads=2), "")
    tensors = load_file(cwd / "model.safetensors") | {"lm_head.weight": torch.zeros(8, 16)}
    rd.save_file(tensors, cwd / "model.safetensors")
    with pytest.raises(rd.BadInput, match="lm_head"):
        rd.load_model(cwd)


@pytest.mark.slow
def test_the_default_run_shows_the_effect(cwd):
    """python recurrent_depth.py, minutes: the figures of its docstring, with room."""
    assert rd.main(rd.train, rd.Config, ["--out", "a"]) == 0
    rows = lines_of(cwd / "a" / "metrics.jsonl")
    row = next(row for row in rows if row["step"] == rd.Config.steps and "eval/accuracy" in row)
    accuracy = {r: row[f"eval/accuracy@{r}"] for r in rd.TEST_R}
    assert accuracy[4] >= accuracy[1] + 0.10 and accuracy[4] >= 0.95 * max(accuracy.values())
    assert accuracy[32] >= accuracy[8] - 0.02 and accuracy[8] > 0.95
    assert row["eval/last_accuracy@4"] >= row["eval/last_accuracy@1"] + 0.15
    assert row["eval/agreement"] >= 0.98
    assert row["eval/accuracy/exit"] >= row["eval/accuracy/full"] - 0.01
    assert row["eval/iterations/exit"] <= 12
