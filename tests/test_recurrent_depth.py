"""recurrent_depth.py: parity with the reference model, its caches and sampler; properties of the loop; the script."""

import importlib.util
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lines_of, metrics_of
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import recurrent_depth as rd  # noqa: E402

ROOT = Path(rd.__file__).parent
spec = importlib.util.spec_from_file_location(
    "shortcuts", ROOT / "docs/experiments/recurrent_depth.py"
)
tool = sys.modules["shortcuts"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
PATH = FOLDER / "latent.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8"))["recurrent_depth"] if PATH.is_file() else {}
TENSORS = load_file(PATH.with_suffix(".safetensors")) if PATH.is_file() else {}
CASE = VECTORS.get("instances", {}).get("a", {})
reference = pytest.mark.skipif(not CASE, reason="tests/vectors/latent.json is not there")
SIZES = {
    "n_embd": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 11,
    "norm_eps": 1e-6,
}
SIZES |= {"rope_base": 50000, "mean_recurrence": 4}


def make(prelude: int = 1, core: int = 1, coda: int = 1, **sizes) -> "rd.Model":
    """A model with the initial weights of the script, and biases that are not 0."""
    layers = {
        "n_layers_in_prelude": prelude,
        "n_layers_in_recurrent_block": core,
        "n_layers_in_coda": coda,
    }
    model = rd.Model(SIZES | layers | sizes)
    rd.initialise(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qk_bias"):
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def num_parameters(model) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The reference's tiny model, written as a published folder and read by load_model."""
    c, folder = CASE["config"], tmp_path_factory.mktemp("published")
    config = {
        "model_type": "huginn_raven",
        "n_embd": c["d_model"],
        "num_attention_heads": c["n_heads"],
    }
    config |= {
        "intermediate_size": c["mlp_hidden"],
        "vocab_size": c["vocab"],
        "norm_eps": c["norm_eps"],
    }
    config |= {
        "rope_base": c["rope_base"],
        "mean_recurrence": 4,
        "tie_embeddings": c["tied"],
        "bias": c["linear_bias"],
    }
    names = {"prelude": "n_prelude", "recurrent_block": "n_core", "coda": "n_coda"}
    config |= {f"n_layers_in_{ours}": c[theirs] for ours, theirs in names.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        n.removeprefix("rd_a."): t for n, t in TENSORS.items() if n.startswith("rd_a.transformer.")
    }
    tensors["freqs_cis"] = torch.zeros(3)  # the published file has such a table
    rd.save_file(
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
        folder / "model.safetensors",
    )
    model = rd.load_model(folder)
    assert num_parameters(model) == CASE["n_params"]
    return model


def tokens_and_state() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(CASE["input_ids"]), TENSORS["rd_a.input_s0"]


def reference_loss(logits: torch.Tensor) -> torch.Tensor:
    """The vectors' labels stand at the position that predicts them."""
    return F.cross_entropy(
        logits.flatten(0, 1), torch.tensor(CASE["labels"]).flatten(), ignore_index=-100
    )


# ------------------------------------------------------------------------------------------------------- parity


@reference
@pytest.mark.parametrize("r", [1, 2, 4, 8, 64])
def test_logits_equal_the_reference(published, r):
    case = CASE["r"][str(r)]
    with torch.no_grad():
        hidden, state = published(tokens_and_state()[0], r, tokens_and_state()[1])
        logits = published.logits(hidden)
        after = published.transformer["ln_f"](
            state
        )  # the reference returns the state behind the norm
    if r < 64:
        torch.testing.assert_close(logits, TENSORS[f"rd_a.logits_r{r}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits[:, -1, :8], torch.tensor(case["logits_last_first8"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        after[:, -1, :8], torch.tensor(case["latent_first8"]), atol=1e-4, rtol=0
    )
    assert logits[:, -1].argmax(-1).tolist() == case["argmax_last"]
    assert reference_loss(logits).item() == pytest.approx(case["loss"], abs=1e-4)
    assert logits.double().sum().item() == pytest.approx(case["logits_sum"], abs=1e-2)


@reference
def test_zero_state_equals_the_reference(published):
    tokens, state = tokens_and_state()
    logits = published.logits(published(tokens, 8, torch.zeros_like(state))[0])[:, -1, :8]
    expected = torch.tensor(CASE["zero_state_r8_logits_last_first8"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@reference
def test_exit_series_equals_the_reference(published):
    """`recur` stops at the first step whose KL in the reference's series is below the threshold, and not before."""
    tokens, state = (x[:1] for x in tokens_and_state())
    series = CASE["exit_metrics_row0"]["kl_prev_to_cur"]
    for step in range(1, 8):  # below 1e-4 the series is rounding noise of float32
        below, above = series[step - 1] * 1.001, series[step - 1] * 0.999
        assert all(kl > below for kl in series[: step - 1])
        taken = [
            rd.recur(published, tokens, state, rd.Cache(published, 1, 9, 24), 24, kl)[2]
            for kl in (below, above)
        ]
        assert taken[0].item() == step < taken[1].item()


@reference
@pytest.mark.parametrize("name, budget", [("full", 6), ("budget2", 2)])
def test_cached_decoding_equals_the_reference(published, name, budget):
    """Row 0: all but the last token in one pass, then the last one, at r = 6."""
    case = CASE["decode_r6_row0"]
    tokens, state = (x[:1] for x in tokens_and_state())
    cache = rd.Cache(published, 1, 9, budget)
    rd.recur(published, tokens[:, :-1], state[:, :-1], cache, 6)
    logits = rd.recur(published, tokens[:, -1:], state[:, -1:], cache, 6)[0][0, -1]
    torch.testing.assert_close(logits, torch.tensor(case[name]), atol=1e-4, rtol=0)
    assert len(cache.keys) == case[f"{name}_n_slots"]
    whole = published.logits(published(tokens, 6, state)[0])[0, -1]
    torch.testing.assert_close(whole, torch.tensor(case["no_cache"]), atol=1e-4, rtol=0)


@reference
@pytest.mark.parametrize("grads, k", [("grad_norm_truncated", 2), ("grad_norm_full", 5)])
def test_truncated_backprop_equals_the_reference(published, grads, k):
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
def test_no_iteration_with_gradient_leaves_the_core_without(published):
    published.zero_grad(set_to_none=True)
    tokens, state = tokens_and_state()
    reference_loss(published.logits(published(tokens, 5, state)[0])).backward()
    without = {name for name, weight in published.named_parameters() if weight.grad is None}
    assert without >= set(CASE["truncated_bptt"]["trap_int_num_steps_core_grads"])


@reference
def test_initial_weights_have_the_reference_spread():
    c = CASE["config"]
    sizes = {"n_embd": c["d_model"], "intermediate_size": c["mlp_hidden"], "vocab_size": c["vocab"]}
    model = make(c["n_prelude"], c["n_core"], c["n_coda"], **sizes)
    for name, std in CASE["init_std_before_perturbation"].items():
        weight = dict(model.named_parameters())[name]
        if not name.endswith("qk_bias"):  # 0 at the start; `make` moves it
            assert weight.std().item() == pytest.approx(std, rel=0.07, abs=1e-9), name
    fresh = rd.Model(model.config)
    rd.initialise(fresh, 0)
    assert all(not w.any() for n, w in fresh.named_parameters() if n.endswith("qk_bias"))
    limit = 3 * math.sqrt(2 / 5 / c["d_model"])
    assert max(w.abs().max() for n, w in fresh.named_parameters() if w.ndim == 2) <= limit
    gate, up = fresh.transformer["coda"][0].mlp["fc"].weight.detach().chunk(2)
    assert (up.std() / gate.std()).item() == pytest.approx(
        1 / math.sqrt(2 * 11), rel=0.05
    )  # L = 2 + 1 + 2 * 4


@pytest.mark.parametrize(
    "case", VECTORS.get("iteration_sampler", {}).get("stats", []), ids=lambda c: str(c["seed"])
)
def test_iteration_sampler(case):
    mean, backprop, rng = (
        case["mean_recurrence"],
        case["mean_backprop_depth"],
        np.random.default_rng(0),
    )
    drawn = np.array([rd.draw_steps(mean, backprop, rng) for _ in range(50_000)])
    values = {"total": drawn.sum(1), "no_grad": drawn[:, 0], "with_grad": drawn[:, 1]}
    assert values["with_grad"].max() <= backprop and drawn.sum(1).min() >= 1
    for name, found in values.items():
        expected = case[name]
        assert found.mean() == pytest.approx(expected["mean"], rel=0.03)
        assert found.std() == pytest.approx(expected["std"], rel=0.03, abs=0.02)
        assert np.median(found) == pytest.approx(expected["median"], abs=1)
        for q, value in expected["q"].items():
            wide = 1 if float(q) < 0.99 else 3
            assert np.quantile(found, float(q)) == pytest.approx(value, abs=wide), (name, q)
    assert (drawn.sum(1) < backprop).mean() == pytest.approx(case["frac_total_below_k"], abs=0.01)
    assert (drawn[:, 0] == 0).mean() == pytest.approx(case["frac_no_grad_zero"], abs=0.01)
    assert (drawn.sum(1) < mean).mean() == pytest.approx(case["frac_total_below_mean"], abs=0.01)


# ------------------------------------------------------------------------------- the loop, its cache, its shortcuts

shapes = pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (1, 2, 2)], ids=str)


def some(model, rows: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(3))
    return tokens, rd.initial_state(model, rows, length, (5,))


def close(a, b, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_initial_state():
    model = make()
    state, cut = rd.initial_state(model, 200, 10, (1, 2, 3)), 3 * math.sqrt(2 / 5)
    assert state.shape == (200, 10, 64) and state.abs().max() <= cut
    assert 0.62 < state.std() < 0.63 and abs(state.mean()) < 0.005
    assert torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 3)))
    assert not torch.equal(state, rd.initial_state(model, 200, 10, (1, 2, 4)))


@shapes
def test_causal(shape):
    model = make(*shape)
    tokens, state = some(model)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    a, b = (model(x, 5, state)[0] for x in (tokens, changed))
    close(a[:, :4], b[:, :4], 0)
    assert (a[:, 4:] - b[:, 4:]).abs().amax((0, 2)).min() > 1e-4


@shapes
def test_iterations_add_up(shape):
    """The state before the norm is the whole state: 3 + 2 iterations are 5."""
    model = make(*shape)
    tokens, state = some(model)
    close(model(tokens, 2, model(tokens, 3, state)[1])[0], model(tokens, 5, state)[0], 0)


def gradients(model, tokens, state, steps, grad_steps) -> dict:
    model.zero_grad(set_to_none=True)
    model.logits(model(tokens, steps, state, grad_steps)[0]).logsumexp(-1).sum().backward()
    return {
        name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()
    }


def test_gradient_of_the_last_iterations():
    model = make(2, 2, 1)
    tokens, state = some(model)
    full, more = (gradients(model, tokens, state, 4, k) for k in (4, 9))
    two, none = (gradients(model, tokens, state, 4, k) for k in (2, 0))
    assert all(torch.equal(full[name], more[name]) for name in full)
    assert all(grad is not None for grad in two.values())  # no parameter is unused
    assert not torch.allclose(two["transformer.adapter.weight"], full["transformer.adapter.weight"])
    loop = [name for name in none if "core_block" in name or "adapter" in name or "prelude" in name]
    assert len(loop) == 37 and all(none[name] is None for name in loop)
    # two of four iterations: the same as two from the state after two, held fixed
    middle = model(tokens, 2, state)[1].detach()
    again = gradients(model, tokens, middle, 2, 2)
    assert all(torch.allclose(two[name], again[name], atol=1e-5) for name in two)
    model.checkpointing = True
    kept = gradients(model, tokens, state, 4, 2)
    assert all(torch.equal(two[name], kept[name]) for name in two)


@shapes
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("cuts", [(1,) * 7, (3, 1, 3), (7,)], ids=str)
def test_cached_equals_uncached(shape, r, cuts):
    model = make(*shape)
    tokens, state = some(model)
    whole = model.logits(model(tokens, r, state)[0])
    for budget in (r, r + 2):
        cache, at, parts = rd.Cache(model, 3, 7, budget), 0, []
        for count in cuts:
            logits, _, taken = rd.recur(
                model, tokens[:, at : at + count], state[:, at : at + count], cache, r
            )
            parts, at = [*parts, logits], at + count
            assert cache.length == at and taken.tolist() == [r] * 3
        close(torch.cat(parts, 1), whole)


class LatestCache:
    """The reference's lookup, entry by entry: a token that stopped early is read at its deepest iteration; a budget
    maps iterations onto each other by their remainder.
    """

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


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("budget", [1, 3, 12])
@pytest.mark.parametrize("exit_kl", [0.0, 3e-3])
@pytest.mark.parametrize("warm", [False, True])
def test_stream_equals_a_naive_cache(shape, budget, exit_kl, warm):
    """Rows of a batch, each with its own exits, against one row at a time with the reference's lookup."""
    model = make(*shape)
    tokens, states = some(model, rows=2, length=5)
    logits, taken = tool.stream(model, tokens, states, 12, exit_kl, budget, warm)
    if exit_kl:
        assert len(taken.unique()) > 2 and (taken[0] != taken[1]).any(), (
            "the case is to be harder than this"
        )
    else:
        assert (taken == 12).all()
    for row in range(2):
        cache, state = LatestCache(model, budget), states[row : row + 1, :1]
        for t in range(5):
            state = state if warm else states[row : row + 1, t : t + 1]
            out, state, steps = rd.recur(
                model, tokens[row : row + 1, t : t + 1], state, cache, 12, exit_kl
            )
            close(out[0, 0], logits[row, t], 1e-4)
            assert steps.item() == taken[row, t]
    if budget == 12 and not warm:  # the script's own, which has neither
        again = rd.stream(model, tokens, states, 12, exit_kl)
        assert torch.equal(again[0], logits) and torch.equal(again[1], taken)


def test_exit_rule_by_hand():
    """A token's output is that of the iteration at which it stopped, and stopping is eq. 8."""
    model = make()
    tokens, states = some(model, rows=1, length=1)
    series = [model.logits(model(tokens, r, states)[0])[0, 0].log_softmax(-1) for r in range(1, 9)]
    kls = [(a.exp() * (a - b)).sum().item() for a, b in zip(series, series[1:], strict=False)]
    first = (
        next(i for i, kl in enumerate(kls) if kl < 1e-3) + 2
    )  # iterations: kls[0] compares the second
    logits, taken = rd.stream(model, tokens, states, 8, exit_kl=1e-3)
    assert taken.item() == first > 2
    close(logits[0, 0].log_softmax(-1), series[first - 1])


@pytest.mark.parametrize("lookahead", [0, 1, 3, 20])
@pytest.mark.parametrize("draft", [1, 2, 6])
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
    if lookahead == 0:
        assert (iterations, passes) == (66, 11)
    elif draft == 6:  # drafts of the full model are all accepted: lookahead + 1 tokens a pass
        assert passes == 1 + math.ceil(10 / (lookahead + 1))
    else:
        assert passes <= 11


def test_state_correlation_and_loss():
    """Two equal states have correlation 1; the loss is a sum over the labels there are, over num_labels."""
    model = make()
    tokens, states = some(model, rows=2, length=4)
    labels = tokens.clone()
    labels[:, 0] = -100
    loss, seen = rd.depth_loss(model, tokens, labels, states, 1, 2, 6)
    logits = model.logits(model(tokens, 3, states)[0])
    by_hand = (
        -sum(logits[b, t].log_softmax(-1)[tokens[b, t]] for b in range(2) for t in range(1, 4)) / 6
    )
    close(loss, by_hand)
    halves = [
        rd.depth_loss(model, tokens[i : i + 1], labels[i : i + 1], states[i : i + 1], 1, 2, 6)
        for i in range(2)
    ]
    close(loss, halves[0][0] + halves[1][0])
    close(seen["accuracy"], sum(half["accuracy"] for _, half in halves))
    state = model(tokens, 3, states)[1]
    tables = [
        np.corrcoef(state[b].detach().numpy()) for b in range(2)
    ]  # each position with each, 1 on the diagonal
    assert seen["state_correlation"].item() == pytest.approx((np.sum(tables) - 8) / 24, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- the script

@pytest.fixture
def text(cwd) -> str:
    words = "to be or not to be, that is the question. "
    (cwd / "text.txt").write_text(words * 20, encoding="utf-8")
    return "--task text --data text.txt --length 16"


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def test_what_a_run_logs(run, cwd):
    done = run("recurrent_depth", "--out a")
    assert (done.code, done.err) == (0, "") and "eval/accuracy@64" in done.out
    steps, evaluations = metrics_of(cwd / "a"), metrics_of(cwd / "a", True)
    assert [row["tokens"] for row in steps] == [88, 88]
    drawn = [sum(rd.draw_steps(4, 4, np.random.default_rng((0, step, 0)))) for step in (1, 2)]
    assert [row["recurrences"] for row in steps] == drawn
    after = evaluations[0]
    assert after["eval/accuracy"] == after["eval/accuracy@4"]
    assert after["eval/iterations/full"] == 4 >= after["eval/iterations/exit"] >= 1
    # with all iterations and a full cache, reading token by token is reading at once
    assert after["eval/loss/full"] == pytest.approx(after["eval/loss@4"], abs=1e-5)
    for line in lines_of(cwd / "a" / "samples.jsonl"):
        assert line["prompt"][0] == "^" and len(line["prompt"]) == 11 and len(line["tokens"]) == 10


def test_each_micro_batch_draws_its_r(run, cwd):
    flags = "--micro_batch_tokens 44 --steps 1 --eval_problems 0 --out a"
    assert run("recurrent_depth", flags).code == 0
    drawn = [sum(rd.draw_steps(4, 4, np.random.default_rng((0, 1, m)))) for m in range(2)]
    assert metrics_of(cwd / "a")[0]["recurrences"] == sum(drawn) / 2


def test_text(run, cwd, text):
    """Characters of the file are the vocabulary; the last tenth is held out; labels are the next tokens."""
    flags = f"{text} --steps 20 --lr 0.01 --batch_size 16 --eval_problems 0 --out a"
    assert run("recurrent_depth", flags).code == 0
    done = run("recurrent_depth", "--resume a --steps 40", base=False)
    assert (done.code, done.err) == (0, "")
    rows = [row for row in lines_of(cwd / "a" / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    model = rd.load_model(cwd / "a" / "step-000040")
    prompter = rd.Prompter(
        model, rd.Config(task="text", data="text.txt", length=16), (cwd / "text.txt").read_text()
    )
    assert (
        prompter.decode(prompter.encode("be, or not")) == "be, or not"
        and 0 not in prompter.task.ids
    )
    inputs, labels = prompter.row(prompter.task.problem("train", 0, 0))
    assert len(inputs) == 16 and inputs[1:] == labels[:-1]
    train, test = (
        [prompter.task.problem(s, 0, i)["ids"] for i in range(99)] for s in ("train", "test")
    )
    held = prompter.task.ids[prompter.task.border :]
    windows = {tuple(held[i : i + 17]) for i in range(0, len(held) - 16, 16)}
    assert {tuple(ids) for ids in test} == windows and all(len(ids) == 17 for ids in train)


def test_bfloat16(run, cwd, monkeypatch):
    """What a GPU does: float32 weights, products in bfloat16, a bfloat16 copy to evaluate."""

    class Run(rd.Run):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.dtype = torch.bfloat16

    assert run("recurrent_depth", "--out b").code == 0
    monkeypatch.setattr(rd, "Run", Run)
    assert run("recurrent_depth", "--out a").code == 0
    a, b = metrics_of(cwd / "a")[0], metrics_of(cwd / "b")[0]
    assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights(cwd / "a" / "step-000002").values())


def test_the_other_shortcuts(run, cwd):
    """The tool's full and exit are the script's; sizes of caches by hand; speculation changes no token."""
    assert run("recurrent_depth", "--out a").code == 0
    flags = "--task s3:elements=10 --eval_problems 3 --eval_samples 1 --test_r 4 --max_new_tokens 3"
    argv = [*flags.split(), "--model", "a/step-000002", "--out", "b"]
    assert rd.main(tool.solve, tool.Config, argv) == 0
    after = metrics_of(cwd / "a", True)[0]
    first, found = metrics_of(cwd / "b", True)
    assert after["step"] == 2 and {**first, "step": 2} == after
    assert first.items() < found.items()
    assert found["eval/cache/full"] == found["eval/cache/exit"] == 2 * 16 * (1 + 4 + 1)
    assert found["eval/cache/shared"] == found["eval/cache/both"] == 2 * 16 * (1 + 1 + 1)
    assert found["eval/iterations/shared"] == 4 and found["eval/same"] == 1
    assert found["eval/iterations/greedy"] == 4 and found["eval/passes/greedy"] == 1


DAMAGE = {
    "model_type": ("model_type", "qwen2", "'model_type': 'qwen2'"),
    "no type": ("model_type", None, "no type"),
    "untied": ("tie_embeddings", False, "'tie_embeddings': False"),
    "no bias": ("qk_bias", False, "'qk_bias': False"),
    "groups": ("num_key_value_heads", 1, "'num_key_value_heads': 1"),
    "no size": ("n_embd", None, "n_embd"),
    "no rotation": ("rope_base", None, "rope_base"),
    "no count": ("n_layers_in_coda", 1.5, "float"),
    "shape": ("vocab_size", 9, "wte.weight"),
    "missing": ("n_layers_in_coda", 2, "transformer.coda.1"),
    "extra": ("n_layers_in_prelude", 0, "transformer.prelude.0"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_folders(cwd, case):
    name, value, message = DAMAGE[case]
    rd.make_model(cwd / "a", rd.Config(hidden_size=16, num_heads=2), "")
    model = rd.load_model(cwd / "a")
    rd.save_model(model, cwd / "b")
    a, b = weights(cwd / "a"), weights(cwd / "b")
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    config = rd.read_json(cwd / "a" / "config.json") | {name: value}
    (cwd / "a" / "config.json").write_text(
        json.dumps({n: v for n, v in config.items() if v is not None})
    )
    with pytest.raises(rd.BadInput) as error:
        rd.load_model(cwd / "a")
    assert (
        message in str(error.value)
        and str(cwd / "a") in str(error.value)
        and "\n" not in str(error.value)
    )
    other = {"lm_head.weight": torch.zeros(8, 16)}
    rd.save_file(b | other, cwd / "b" / "model.safetensors")
    with pytest.raises(rd.BadInput, match="lm_head"):
        rd.load_model(cwd / "b")


def test_the_published_size():
    """huginn-0125's sizes on the meta device: 3.5 billion parameters."""
    sizes = {
        "n_embd": 5280,
        "num_attention_heads": 55,
        "intermediate_size": 17920,
        "vocab_size": 65536,
    }
    layers = {"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2}
    with torch.device("meta"):
        model = rd.Model(SIZES | sizes | layers | {"mean_recurrence": 32})
    blocks = 8 * (
        4 * 5280**2 + 3 * 5280 * 17920 + 4 * 5280 + 2 * 5280
    )  # weights, norms, biases of q and k
    assert num_parameters(model) == blocks + 65536 * 5280 + 2 * 5280**2 + 5280 == 3564976800
    assert len(model.frequencies) == 48 and model.frequencies[0] == 1


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
    assert (
        row["eval/accuracy/exit"] >= row["eval/accuracy/full"] - 0.01
        and row["eval/iterations/exit"] <= 12
    )
