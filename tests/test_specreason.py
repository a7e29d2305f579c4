"""specreason.py and docs/experiments/specreason.py: the vectors, the exactness of speculative decoding, the caches,
the limit on tokens, and runs as a user meets them."""

import doctest
import importlib.util
import json
import math
import sys
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT, lines_of, records_of
from test_vectors import cases, check, near

import rewards
import specreason as sr

SMALL = "--eval_problems 2 --max_new_tokens 24 --max_step_tokens 12"
SWEEP = f"{SMALL} --sweep_problems 1 --thresholds 1,9"


def load_tool():
    """docs/experiments/specreason.py, beside the script of the same name."""
    spec = importlib.util.spec_from_file_location("specreason_tool", ROOT / "docs" / "experiments" / "specreason.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# -------------------------------------------------------------------------------------------------- the vectors


def scripted(steps: list) -> list[list[str]]:
    """[text, tokens] as a list of so many pieces: the text, its tag apart, fillers, the delimiter."""
    made = []
    for text, count in steps:
        words = [text.removesuffix("</think>"), "</think>"] if text.endswith("</think>") else [text]
        made.append(words + [""] * (count - len(words) - 1) + ["\n\n"])
    return made


@cases("test_time", "specreason")
def test_specreason_vectors(case):
    given, expected = case["input"], case["expected"]
    small, base = scripted(given["small_steps"]), scripted(given["base_steps"])
    tops, calls, prefixes, cuts = iter(given["score_logprobs"]), [], [], []

    def writer(name, steps):
        left = iter(steps)

        def write(text):
            calls.append(name)
            return next(left)

        return write

    def score(text, step):
        calls.append("base_score")
        prefixes.append("".join(text + step))
        top = next(tops)
        words = [str(d) for d in range(10)] + sorted(w for w in top if not w.isdigit())
        logprobs = torch.tensor([top.get(word, -math.inf) for word in words], dtype=torch.float64)
        return sr.read_digit(logprobs, list(range(10)), given["score_method"])

    def finished(steps):
        texts = ["".join(step.tokens) for step in steps]
        same = len(texts) > 2 and texts[-1] == texts[-2]
        return same or any(mark in texts[-1] for mark in ("boxed", "Answer:", "ANSWER:"))

    names = ("threshold", "first_n", "token_budget")
    writers = writer("small_generate", small), writer("base_generate", base)
    steps, reason = sr.reason(
        ["<think>"], *writers, score, finished, cuts.append, *(given[n] for n in names), drop=("</think>",)
    )
    check("test_time", case, ["".join(s.tokens).removesuffix("\n\n") for s in steps], expected["steps"])
    check("test_time", case, [s.writer.replace("draft", "small") for s in steps], expected["writer"])
    scores = [[-1 if u is None else u for u in row] for row in ([s.score for s in steps], expected["scores"])]
    near("test_time", case, *scores, 1e-9)
    accepted = [None if s.score is None else s.writer == "draft" for s in steps]
    check("test_time", case, accepted, expected["accepted"])
    check("test_time", case, reason, expected["stop_reason"])
    check("test_time", case, {name: calls.count(name) for name in expected["calls"]}, expected["calls"])
    check("test_time", case, prefixes[-1], expected["last_prefix_scored"])
    lost = sum(len(s.drafted) for s in steps if s.writer == "base" and s.drafted)
    check("test_time", case, lost, expected["discarded_small_tokens"])
    cut = [s.writer == "draft" and "</think>" in s.drafted and "</think>" not in s.tokens for s in steps]
    check("test_time", case, cut, expected["think_delimiter_stripped"])
    kept = sum(len(s.tokens) + c for s, c in zip(steps, cut, strict=True))  # the tag was written, and counts
    check("test_time", case, kept, expected["kept_tokens"])
    first = len(steps[0].drafted) if steps[0].writer == "draft" else 0
    assert cuts[0] == 1 + first  # both caches: what was there before, and the step if it stays


@cases("test_time", "speculative_decoding")
def test_speculative_decoding_vectors(case):
    given, expected = case["input"], case.get("expected")
    if "p_target" in given:
        p, q = (torch.tensor(given[name], dtype=torch.float64) for name in ("p_target", "q_draft"))
        rates = [None if math.isnan(r) else r for r in sr.acceptance(p, q).tolist()]
        near("test_time", case, [r for r in rates if r is not None],
             [r for r in expected["accept_prob_per_token"] if r is not None], 1e-9)  # fmt: skip
        check("test_time", case, [r is None for r in rates], [r is None for r in expected["accept_prob_per_token"]])
        alpha = float((q * sr.acceptance(p, q).nan_to_num()).sum())
        near("test_time", case, [alpha, 1 - alpha], [expected["alpha"], expected["total_variation"]], 1e-9)
        rest = sr.residual(p, q)
        near("test_time", case, rest.tolist(), expected["residual"] or p.tolist(), 1e-9)
        first = q * sr.acceptance(p, q).nan_to_num() + (1 - alpha) * rest
        near("test_time", case, first.tolist(), expected["first_token_distribution"], 1e-9)
        # and through `verify`: every token the draft could propose, at every uniform of a fine grid
        grid = [(i + 0.5) / 1000 for i in range(1000)]
        mass = torch.zeros_like(p)
        for token in q.nonzero()[:, 0].tolist():
            for u in grid:
                kept, behind = sr.verify(torch.stack([p, p]), q[None], torch.tensor([token]), torch.tensor([u]))
                mass += q[token] / 1000 * (torch.eye(len(p))[token] if kept else behind)
        assert mass.tolist() == pytest.approx(expected["first_token_distribution"], abs=2e-3)
    elif "draft_tokens" in given:
        p, q = (torch.tensor(given[name], dtype=torch.float64) for name in ("p_target_rows", "q_draft_rows"))
        drafted, uniforms = torch.tensor(given["draft_tokens"]), torch.tensor(given["uniforms"], dtype=torch.float64)
        kept, behind = sr.verify(p, q, drafted, uniforms)
        check("test_time", case, (kept, drafted[:kept].tolist()), (expected["n_accepted"], expected["kept"]))
        near("test_time", case, behind.tolist(), expected["last_token_distribution"], 1e-9)
    else:
        alphas = given.get("alphas") or [given["alpha"]] * given["gamma"]
        near("test_time", case, tool.expected_tokens(alphas), expected["expected_tokens_per_target_call"], 1e-9)
        if "accepted_count_pmf" in expected:  # tokens per call = 1 + the mean of this distribution
            mean = sum(k * p for k, p in enumerate(expected["accepted_count_pmf"]))
            near("test_time", case, tool.expected_tokens(alphas), 1 + mean, 1e-9)
            near("test_time", case, math.prod(alphas), expected["prob_all_accepted"], 1e-9)
            factor = tool.decoding_speedup(alphas, given["cost_ratio_c"])
            near("test_time", case, factor, expected["walltime_factor_verify_cost_1"], 1e-9)
        if "verify_cost_v" in given:
            factor = tool.decoding_speedup(alphas, given["cost_ratio_c"], given["verify_cost_v"])
            near("test_time", case, factor, expected["walltime_factor_measured_verify"], 1e-9)


# ----------------------------------------------------------------------------------------------------- exactness

V, N = 12, 2000


class Table:
    """In place of a Reader: a bigram model whose distributions are a table (V, V); notes nothing, forgets nothing."""

    def __init__(self, logits: torch.Tensor, seed: int, temperature: float = 1.0):
        self.rows = (logits / temperature).softmax(-1)
        self.random = np.random.default_rng(seed)

    def probs(self, text, count=1):
        return self.rows[text[-count:]]

    def uniforms(self, like, count):
        return like.new_tensor(self.random.random(count))

    def draw(self, probs):
        return int(sr.draw(probs[None], self.uniforms(probs, 1)[None]))

    def forget(self, length): ...


def tables(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    p, noise = (torch.randn(V, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return p, 0.6 * p + 0.9 * noise


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom, cells with an expectation below 5 merged."""
    rare = expected < 5
    c, e = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return float(((c - e) ** 2 / e).sum()), len(c) - 1


def deviates(p: torch.Tensor, sample) -> bool:
    """Two tokens behind token 0, N times, against the enumerated joint: beyond the 0.999 quantile (Wilson-Hilferty)?"""
    counts = np.zeros((V, V))
    for _ in range(N):
        a, b = sample()
        counts[a, b] += 1
    probs = p.softmax(-1)
    statistic, k = chi_square(counts.ravel(), N * (probs[0][:, None] * probs).flatten().numpy())
    return statistic > k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


def test_speculative_decoding_is_exact():
    p, q = tables()
    base, draft, rounds = Table(p, 1), Table(q, 2), []
    assert not deviates(p, lambda: sr.write_speculatively(base, draft, [0], 2, set(), 2, rounds))
    # the share that is kept: alpha of eq. 5 for the first of a round behind token 0
    probs = p.softmax(-1), q.softmax(-1)
    alpha = float(torch.minimum(*(x[0] for x in probs)).sum())
    assert 0.3 < alpha < 0.9


def match_only(p, q, drafted, uniforms):
    """Planted: keep what the base itself would draw, but then use the residual."""
    own = [int(sr.draw(row[None], u.view(1, 1))) for row, u in zip(p[:-1], uniforms, strict=True)]
    kept = next((i for i, (a, b) in enumerate(zip(own, drafted.tolist(), strict=True)) if a != b), len(drafted))
    return kept, p[kept] if kept == len(drafted) else sr.residual(p[kept], q[kept])


@pytest.mark.parametrize("bug", ["residual is p", "draft at 1.5", "greedy draft", "match only"])
def test_four_planted_bugs_are_found(bug, monkeypatch):
    p, q = tables()
    base, draft = Table(p, 1), Table(q, 2)
    if bug == "residual is p":
        monkeypatch.setattr(sr, "residual", lambda p, q: p)
    if bug == "match only":
        monkeypatch.setattr(sr, "verify", match_only)
    if bug == "draft at 1.5":  # drawn from another distribution than the ratio takes
        warm = (q / 1.5).softmax(-1)
        draft.draw = lambda probs: int(torch.multinomial(warm[(draft.rows == probs).all(-1)][0], 1))
    if bug == "greedy draft":
        draft.draw = lambda probs: int(probs.argmax())
    torch.manual_seed(3)
    assert deviates(p, lambda: sr.write_speculatively(base, draft, [0], 2, set(), 2, []))


def pair_of(flags: str = "", kind=sr.Pair, double: bool = False) -> sr.Pair:
    cfg = sr.parse_config(tool.Config, flags.split() + ["--model", "tiny-judge"] * ("--model" not in flags))
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode(False):
        base = sr.Run.load(run, sr.BY_SIZE)[1]
        draft = sr.load_draft(run, base)
    if double:
        base.double(), draft.double()
    with patch.object(tool, "measure", return_value={}):  # seconds
        return kind(cfg, base, draft, sr.Prompter(base, rewards.make_task(cfg.task), False))


def training_problem(number: int) -> dict:
    return rewards.make_task("countdown").problem("train", 9, number)


def test_real_model_writes_its_own_distribution():
    """z of the surprisal: sum of (-log p(x_t) - H_t) over its standard deviation is N(0, 1) under exactness."""
    c = pair_of("--max_new_tokens 200")
    total = variance = count = 0.0
    for n in range(18):
        a, _, _ = c.answer(n, training_problem(n), gamma=4)
        logits = c.reread(a)
        logprobs = logits.double().log_softmax(-1)
        p = logprobs.exp()
        entropy = torch.special.entr(p).sum(-1)
        spread = (p * logprobs.clamp(min=-100).square()).sum(-1) - entropy.square()
        chosen = logprobs.gather(-1, torch.tensor(a.tokens)[:, None])[:, 0]
        total, variance = total - float((chosen + entropy).sum()), variance + float(spread.sum())
        count += len(a.tokens)
    assert count >= 1200 and abs(total) / math.sqrt(variance) < 4


def test_greedy_tokens_are_equal():
    c = pair_of("--temperature 0 --max_new_tokens 100", double=True)
    for n in range(6):
        alone, _, _ = c.answer(n, training_problem(n))
        both, _, record = c.answer(n, training_problem(n), gamma=4)
        assert alone.tokens == both.tokens and record["rounds"] < 0.8 * len(alone.tokens)


# ------------------------------------------------------------------------------------------- SpecReason's machine


@pytest.mark.parametrize("threshold", [0.0, 10.0])
def test_thresholds_beyond_the_scale_are_the_models_alone(threshold):
    """All kept is the draft alone, all refused the base alone: token for token, with the same random numbers."""
    c = pair_of("--max_new_tokens 150")
    c.drop, c.own_steps = (), [-1.0, -0.1]
    for n in range(3):
        done, steps, record = c.answer(n, training_problem(n), c.points, threshold)
        assert record["accepted"] == (threshold == 0) * record["drafted"] == len(steps) * (threshold == 0)
        if threshold:
            assert done.tokens == c.answer(n, training_problem(n))[0].tokens
            continue
        reader = sr.Reader(c.draft, c.size, len(done.prompt) + 200, c.cfg, (0, 1, n, 0))
        tokens = []
        while len(tokens) < 150 and not (tokens and tokens[-1] in c.eos):
            tokens += sr.write(reader, done.prompt + tokens, min(48, 150 - len(tokens)), c.ends)
        assert done.tokens == tokens


def test_base_alone_is_generate():
    """A problem at a time and `generate` of the shared sampler draw the same tokens from the same numbers."""
    c = pair_of("--max_new_tokens 60")
    a, _, record = c.answer(5, training_problem(0))
    uniforms = torch.from_numpy(sr.row_uniforms(0, 0, 5, 0, 60))[None]
    s = sr.generate(c.base, [a.prompt], uniforms)
    assert a.tokens == s.tokens[0, : s.lengths[0]].tolist()
    assert a.finished == (a.tokens[-1] in c.eos) == (record["clipped_ratio"] == 0)


@pytest.mark.parametrize("limit, flags", [(1, ""), (7, ""), (33, "--score digit")])
def test_nothing_is_written_past_the_limit(limit, flags, monkeypatch):
    """Whoever writes; and what fits is what a larger limit lets be written."""
    c, longer = (pair_of(f"--max_new_tokens {n} {flags}", tool.Experiment) for n in (limit, limit + 8))
    for pair in (c, longer):
        pair.own_steps = [-2.0, -0.5, -0.1]
    cut_short = 0
    for n in range(2):
        longer_ways = longer.ways(n)
        for name, how in c.ways(n).items():
            done, steps, record = c.answer(n, training_problem(n), **how)
            whole, _, _ = longer.answer(n, training_problem(n), **longer_ways[name])
            assert len(done.tokens) <= limit and record["tokens"] == len(done.tokens), name
            assert max(len(step.drafted or []) for step in steps) <= limit
            if name in ("base", "spec_decode", "draft"):
                assert done.tokens == whole.tokens[:limit], name
                cut_short += len(whole.tokens) > limit
                assert done.finished == (len(whole.tokens) < limit), name
    assert cut_short


@pytest.mark.parametrize("how", [{"score": "likelihood"}, {"score": "digit", "gamma": 3}, {"gamma": 3}])
def test_caches_hold_the_kept_text_and_nothing_else(monkeypatch, how):
    """After a problem with refusals each cache equals that of one pass over the text it has read."""
    readers, how = [], dict(how)

    class Kept(sr.Reader):
        def __init__(self, *args):
            super().__init__(*args)
            readers.append(self)

    monkeypatch.setattr(sr, "Reader", Kept)
    flags = f"--score {how.pop('score')}" if "score" in how else ""
    c = pair_of(f"--max_new_tokens 120 --max_step_tokens 13 {flags}")  # short: steps are cut inside a round
    c.own_steps, c.request = [-2.0, -0.5, -0.1], c.prompter.encode("<score>")
    score = {"score": c.points, "threshold": 4.0} if flags else {}
    done, _, record = c.answer(1, training_problem(1), **score, **how)
    assert not flags or 0 < record["accepted"] < record["drafted"]
    text = done.prompt + done.tokens
    assert len(readers) == 2
    for reader in list(readers):
        known = min(reader.known, len(text))
        fresh = sr.Reader(reader.model, c.size, known + 1, c.cfg, (0, 0, 0, 0))
        if known:
            fresh.read(text[:known])
        for name in ("keys", "values"):
            for ours, right in zip(getattr(reader.cache, name), getattr(fresh.cache, name), strict=True):
                torch.testing.assert_close(ours[:, :, :known], right[:, :, :known], atol=1e-4, rtol=1e-4)


def test_a_step_cut_inside_a_round_leaves_no_trace():
    """Kept tokens beyond the limit of a step are not part of the text: both readers forget them."""

    class Counted(Table):
        known = 99

        def forget(self, length):
            self.known = min(self.known, length)

    p, _ = tables()
    base, draft, rounds = Counted(p, 1), Counted(p, 2), []
    assert len(sr.write_speculatively(base, draft, [0, 0], 2, set(), 4, rounds)) == 2
    assert rounds == [(4, 4)] and base.known == draft.known == 4


def test_reader_reads_only_what_is_new():
    c = pair_of()
    passes, reader = [], sr.Reader(c.base, c.size, 40, c.cfg, (0, 0, 0, 0))
    reader.model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    text = list(range(50, 70))
    whole = reader.read(text)
    reader.read([*text, 70, 71])
    reader.forget(10)
    again = reader.read(text)
    reader.read([*text, 72, 73, 74], 4)  # the last of the text again, for the distribution behind it
    assert passes == [20, 2, 10, 4]
    torch.testing.assert_close(whole, again)


def test_idle_layers_change_nothing_but_the_time():
    c, tokens = pair_of(), torch.arange(50, 80)[None]
    before = c.base(tokens)
    with torch.inference_mode(False):
        tool.deepen(c.base, 3)
    assert torch.equal(before, c.base(tokens)) and len(c.base.model.layers) == 9
    assert len(sr.Cache(c.base, 1, 4).keys) == 9 == c.base.config["num_hidden_layers"]


def test_digits_and_likelihood():
    logprobs = torch.tensor([0.05] * 2 + [0.3, 0.6]).log()
    assert sr.read_digit(logprobs, [9, 9, 2, 9, 9, 9, 9, 9, 3, 9], "greedy") == 8.0
    mean = (2 * 0.3 + 8 * 0.6) / 0.9
    assert sr.read_digit(logprobs, [9, 9, 2, 9, 9, 9, 9, 9, 3, 9], "average") == pytest.approx(mean)
    # undecided between two: no excess surprise for either; sure of the first: the second is far below
    logits = torch.tensor([[0.0, 0.0, -30.0], [9.0, 0.0, -30.0]])
    assert sr.least_agreement(logits[:1], [1]) == pytest.approx(0.0, abs=1e-5)
    assert sr.least_agreement(logits, [0, 1]) == pytest.approx(-9.0, abs=0.01)


def test_nucleus_and_temperature_shape_both_distributions():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = sr.distribution(logits, 0.5, 0.9)
    full = (logits / 0.5).softmax(-1)
    assert p[2:].tolist() == [0.0, 0.0] and p[0] == pytest.approx(float(full[0] / full[:2].sum()))
    assert sr.distribution(logits, 0.0).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_oracle_grades():
    task, problem = rewards.make_task("countdown"), {"numbers": [7, 1, 5], "target": 2}
    grade = lambda step, before="": tool.grade_step(task, problem, before, step)  # noqa: E731
    assert grade("7+5*1=7+5=12>2\n") == 9 and grade("7+5*1=7+5=13>2\n") == 0 and grade("7+5*1=7+5=12<2\n") == 0
    assert grade("wait7+5*1=7+5=12>2\n", "7+5*1=7+5=12>2\n") == 5 and grade("7+7*1=7+7=14>2\n") == 0
    assert grade("</think><answer>7-5*1</answer>") == 9 and grade("</think><answer>7+5*1</answer>") == 0


def test_data_that_teaches(tmp_path):
    """Every step of a draft's answer with a solver's grade, behind what a perfect judge leaves of those before it."""
    steps = ["7+5*1=7+5=12>2\n", "7-5*1=7-5=3>2\n", "7+5*1=7+5=12>2\n", "</think><answer>7-5*1</answer>"]
    answer = {"prompt": "7,1,5=2<think>", "completion": "".join(steps)}
    (tmp_path / "drafted.jsonl").write_text(30 * (json.dumps(answer) + "\n"), encoding="utf-8")
    tool.graded_steps(str(tmp_path / "drafted.jsonl"), str(tmp_path / "judge.jsonl"), 0)
    rows = lines_of(tmp_path / "judge.jsonl")
    assert len(rows) == 120 and all(list(row) == ["prompt", "completion"] for row in rows)
    befores = [set() for _ in steps]
    for i, row in enumerate(rows):
        step = steps[i % 4] + "<eos>" * (i % 4 == 3)
        before = row["prompt"].removeprefix(answer["prompt"]).removesuffix(f"{step}<score>")
        assert row["prompt"] == f"{answer['prompt']}{before}{step}<score>"
        befores[i % 4].add(before)
        repeated = i % 4 == 2 and steps[0] in before
        assert row["completion"] == ("9", "0", "5" if repeated else "9", "9")[i % 4]
    assert befores == [{""}, {"", steps[0]}, {"", steps[0]}, {"", steps[2], steps[0] + steps[2]}]
    (tmp_path / "drafted.jsonl").write_text('{"prompt": "7+5=", "completion": "x"}', encoding="utf-8")
    with pytest.raises(rewards.BadInput, match="drafted.jsonl, line 1"):
        tool.graded_steps(str(tmp_path / "drafted.jsonl"), str(tmp_path / "judge.jsonl"), 0)


def test_the_digit_is_that_of_a_plain_pass_and_leaves_no_trace():
    """Points of a step are eq. 2 of one pass without a cache; <score> is forgotten at once. Only the judge knows it."""
    c, problem = pair_of("--score digit", tool.Experiment), training_problem(0)
    reader = sr.Reader(c.base, c.size, 100, c.cfg, (0, 0, 0, 0))
    text, line = c.prompter.text(problem), c.prompter.task.trace(problem, Random(0)).partition("\n")[0] + "\n"
    text, step = c.prompter.encode(text), c.prompter.encode(line)
    points = c.points(reader, text, step)
    logits = c.base.logits(c.base(torch.tensor([text + step + c.prompter.encode("<score>")])))[0, -1]
    digits = logits[c.digits].softmax(-1)
    assert points == pytest.approx(float(digits @ torch.arange(10.0)), abs=0.02)
    assert reader.known == len(text + step) and digits[[0, 5, 9]].sum() > 0.95
    assert tool.knows_score(c)
    with pytest.raises(rewards.BadInput, match="was not taught <score>"):
        pair_of("--score digit --model tiny-rl", tool.Experiment)


def test_docstring_examples():
    assert doctest.testmod(tool) == (0, 5)


def test_calibration():
    """u of eq. 3 is a rank among the base's own steps: a step as bad as its worst tenth gets 1."""
    c = pair_of("--max_new_tokens 25")
    c.calibrate()
    own = c.own_steps
    assert len(own) >= 48 and own == sorted(own) and own[-1] <= 0
    problem = c.prompter.task.problem("train", 0, 3)  # one of those it was calibrated on
    done, steps, _ = c.answer(3, problem)
    reader, text = sr.Reader(c.base, c.size, 99, c.cfg, (0,)), list(done.prompt)
    for step in steps:
        u = c.points(reader, text, step.tokens)
        least = sr.least_agreement(c.reread(done)[len(text) - len(done.prompt) :][: len(step.tokens)], step.tokens)
        place = min(range(len(own)), key=lambda i: abs(own[i] - least))
        assert own[place] == pytest.approx(least, abs=1e-4)
        assert u == pytest.approx(min(9, 10 * place / len(own)), abs=10 * (1 + own.count(own[place])) / len(own))
        text += step.tokens


def test_controls():
    """A coin keeps SpecReason's share of steps, the oracle what a solver calls right, `draft` everything."""
    c = pair_of("--max_new_tokens 90", tool.Experiment)
    c.own_steps = [-4.0, -2.0, -0.5, -0.1]
    kept = {"specreason": [], "coin": []}
    for n in range(6):
        ways = c.ways(n)
        assert list(ways) == ["base", "spec_decode", "specreason", "coin", "draft", "threshold 0.1",
                              "threshold 1", "threshold 5", "hierarchical", "oracle"]  # fmt: skip
        for name in ("specreason", "coin", "oracle", "draft"):
            _, steps, record = c.answer(n, training_problem(n), **ways[name])
            if name in kept:
                kept[name].append(record["accepted"] / record["drafted"])
            if name == "specreason":
                assert [u for u, _ in record["marks"]] == [s.score for s in steps]
                assert {type(right) for _, right in record["marks"][:-1]} <= {bool}  # the last may be cut
                assert record["clipped_ratio"] or record["marks"][-1][1] is not None
            if name == "oracle":
                assert all((s.score > 0) == (s.writer == "draft") for s in steps)
            if name == "draft":
                assert {s.writer for s in steps} == {"draft"}
    assert 0.2 < np.mean(kept["specreason"]) < 0.95
    assert np.mean(kept["coin"]) == pytest.approx(np.mean(kept["specreason"]), abs=0.25)
    assert list(c.ways(c.cfg.sweep_problems)) == ["base", "spec_decode", "specreason"]


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def go(cwd, capfd, monkeypatch):
    def calibrate(pair):  # seconds; see test_calibration
        pair.own_steps = [-2.0, -0.5, -0.1]

    monkeypatch.setattr(sr.Pair, "calibrate", calibrate)

    def go(flags: str, module=sr) -> SimpleNamespace:
        loop = sr.solve if module is sr else tool.experiment
        with torch.inference_mode(False):
            code = sr.main(loop, module.Config, flags.split())
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return go


def test_the_table_and_the_records_of_a_run(go, cwd):
    done = go(f"{SMALL} --out a")
    assert (done.code, done.err) == (0, "")
    (line,) = lines_of(cwd / "a" / "metrics.jsonl")
    ways = {name.split("/")[2] for name in line if name.startswith("eval/accuracy/")}
    assert ways == {"base", "spec_decode", "specreason"} and line["eval/speedup/base"] == 1
    for way in ways:  # the table, side by side
        (row,) = [row.split() for row in done.out.splitlines() if row.split()[:1] == [way]]
        assert float(row[1]) == pytest.approx(line[f"eval/accuracy/{way}"], abs=1e-3)
        assert float(row[-1]) == pytest.approx(line[f"eval/speedup/{way}"], abs=1e-3)
    (sample,) = lines_of(cwd / "a" / "samples.jsonl")
    assert 0 < len(sample["tokens"]) == len(sample["logprobs"]) <= 24 and max(sample["logprobs"]) <= 0
    (saved,) = records_of(cwd / "a")
    record = saved["records"][1]["specreason"]
    assert record["tokens"] == len(sample["tokens"]) and len(record["marks"]) == record["drafted"]


def test_the_tool_writes_the_same_records_and_more(go, cwd):
    assert go(f"{SMALL} --out a").code == 0
    done = go(f"{SWEEP} --out b", tool)
    assert (done.code, done.err) == (0, "")
    for words in ("points, above", "area under the curve", "tokens per pass", "predicted specreason", "threshold"):
        assert words in done.out, words
    plain, more = (records_of(cwd / name)[0]["records"] for name in "ab")
    assert set(more[0]) > set(more[1]) == {"base", "spec_decode", "specreason"} and "threshold 9" in more[0]
    for a, b in zip(plain, more, strict=True):
        for way in a:
            marks = [record[way].pop("marks") for record in (a, b)]
            assert a[way] == b[way] and [u for u, _ in marks[0]] == [u for u, _ in marks[1]]
            assert {right for _, right in marks[0]} <= {None} and {right for _, right in marks[1][:-1]} <= {True, False}
    table = go("--tables b", tool)
    assert table.code == 0 and table.out.strip() in done.out
    assert go("--tables nothing", tool).code == 2


def test_resume_of_the_tool_with_more_problems(go, cwd):
    flags = f"{SMALL} --model tiny-judge --score digit --sweep_problems 1"
    assert go(f"{flags} --out whole --eval_problems 3", tool).code == 0
    assert go(f"{flags} --out halves", tool).code == 0
    assert go("--resume halves --eval_problems 3", tool).code == 0
    whole, halves = cwd / "whole", cwd / "halves"
    assert records_of(whole) == records_of(halves)
    assert [row["step"] for row in lines_of(halves / "metrics.jsonl")] == [2, 3]
    assert [path.name for path in halves.glob("step-*")] == ["step-000003"]
    assert lines_of(whole / "samples.jsonl")[-1] == lines_of(halves / "samples.jsonl")[-1]


def test_padding_is_never_drawn_whichever_model_has_more_of_it():
    """Two models with one tokenizer and embeddings of two sizes (Qwen2.5-1.5B, -7B): p and q fit."""
    c = pair_of()
    for longer in (c.base, c.draft):
        head = torch.nn.Parameter(torch.cat([longer.lm_head.weight, 9 * torch.ones(64, longer.config["hidden_size"])]))
        longer.lm_head.weight, longer.config["vocab_size"] = head, len(head)
        longer.vocab_bias = torch.zeros(len(head))
        longer.vocab_bias[c.size :] = -torch.inf
        other = sr.Pair(c.cfg, c.base, c.draft, c.prompter)
        probs = [sr.Reader(m, other.size, 9, c.cfg, (0,)).probs([60, 61], 2) for m in (c.base, c.draft)]
        assert probs[0].shape == probs[1].shape and all(float(p[:, c.size :].sum()) == 0 for p in probs)
        assert max(other.answer(1, training_problem(1), gamma=2)[0].tokens) < c.size


@pytest.mark.parametrize("model, draft", [("Qwen2.5-1.5B", "Qwen2.5-0.5B"), ("Qwen/Qwen3-1.7B-Base", "Qwen3-0.6B-Base")])
def test_the_draft_is_of_the_bases_family(model, draft, monkeypatch):
    asked, loaded = [], torch.nn.Linear(1, 1)
    loaded.tokenizer = SimpleNamespace(get_vocab=dict)
    monkeypatch.setattr(sr, "resolve_model", lambda name: asked.append(name) or "folder")
    monkeypatch.setattr(sr, "load_model", lambda folder, device: loaded)
    run = SimpleNamespace(cfg=sr.Config(model=model), device="cpu", dtype=torch.float32)
    assert sr.load_draft(run, loaded) is loaded and asked == [draft] == [run.cfg.draft]
    assert not loaded.weight.requires_grad
