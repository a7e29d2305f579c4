"""specreason.py: the vectors, the exactness of speculative decoding, the caches, and runs as a user meets them."""

import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import finish, lines_of, start
from test_vectors import cases, check, near

import rewards
import specreason as sr

SMALL = "--eval_problems 2 --sweep_problems 1 --max_new_tokens 24 --max_step_tokens 12 --thresholds 1,9"


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
        near("test_time", case, sr.expected_tokens(alphas), expected["expected_tokens_per_target_call"], 1e-9)
        if "accepted_count_pmf" in expected:  # tokens per call = 1 + the mean of this distribution
            mean = sum(k * p for k, p in enumerate(expected["accepted_count_pmf"]))
            near("test_time", case, sr.expected_tokens(alphas), 1 + mean, 1e-9)
            near("test_time", case, math.prod(alphas), expected["prob_all_accepted"], 1e-9)
            factor = sr.decoding_speedup(alphas, given["cost_ratio_c"])
            near("test_time", case, factor, expected["walltime_factor_verify_cost_1"], 1e-9)
        if "verify_cost_v" in given:
            factor = sr.decoding_speedup(alphas, given["cost_ratio_c"], given["verify_cost_v"])
            near("test_time", case, factor, expected["walltime_factor_measured_verify"], 1e-9)


# ----------------------------------------------------------------------------------------------------- exactness

V, N = 12, 2000


class Table:
    """In place of a Reader: a bigram model whose distributions are a table (V, V); notes nothing, forgets nothing."""

    def __init__(self, logits: torch.Tensor, seed: int, temperature: float = 1.0):
        self.rows = (logits / temperature).softmax(-1)
        self.rng = np.random.default_rng(seed)
        self.uniforms = iter(self.rng.random, None)

    def probs(self, text, count=1):
        return self.rows[text[-count:]]

    def draw(self, probs):
        return int(sr.draw(probs[None], torch.tensor([[next(self.uniforms)]], dtype=probs.dtype)))

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


def contest(flags: str = "", double: bool = False) -> sr.Contest:
    cfg = sr.parse_config(sr.Config, flags.split())
    base, draft = (sr.load_model(sr.resolve_model(name)) for name in ("tiny-judge", "tiny-draft"))
    if double:
        base.double(), draft.double()
    sr.Run.choose(SimpleNamespace(cfg=cfg), base, sr.BY_SIZE)
    return sr.Contest(cfg, base, draft, sr.Prompter(base, rewards.make_task(cfg.task), False))


def test_real_model_writes_its_own_distribution():
    """z of the surprisal: sum of (-log p(x_t) - H_t) over its standard deviation is N(0, 1) under exactness."""
    c = contest("--max_new_tokens 200")
    total = variance = count = 0.0
    for n in range(28):
        c.solve_one(n, c.prompter.task.problem("train", 9, n), "spec_decode", {"gamma": 4})
        a = c.answer
        logits = sr.Reader(c.models[0], 400, c.size, c.cfg, (0, 0, 0, 0)).read(a.prompt + a.tokens, len(a.tokens) + 1)
        logprobs = logits[:-1].double().log_softmax(-1)
        p = logprobs.exp()
        entropy = torch.special.entr(p).sum(-1)
        spread = (p * logprobs.clamp(min=-100).square()).sum(-1) - entropy.square()
        chosen = logprobs.gather(-1, torch.tensor(a.tokens)[:, None])[:, 0]
        total, variance = total - float((chosen + entropy).sum()), variance + float(spread.sum())
        count += len(a.tokens)
    assert count >= 2000 and abs(total) / math.sqrt(variance) < 4


def test_greedy_tokens_are_equal():
    c = contest("--temperature 0 --max_new_tokens 100", double=True)
    for n in range(6):
        problem = c.prompter.task.problem("train", 9, n)
        c.solve_one(n, problem, "base", {})
        alone = c.answer.tokens
        c.solve_one(n, problem, "x", {"gamma": 4})
        assert alone == c.answer.tokens and len(c.rounds) < 0.8 * len(alone)


# ------------------------------------------------------------------------------------------- SpecReason's machine


@pytest.mark.parametrize("threshold, way", [(0.0, "draft"), (10.0, "base")])
def test_thresholds_beyond_the_scale_are_the_models_alone(threshold, way):
    """All kept is the draft alone, all refused the base alone: token for token, with the same random numbers."""
    c = contest("--max_new_tokens 150")
    c.drop, c.quantiles = (), [-1.0, -0.1]
    for n in range(3):
        problem = c.prompter.task.problem("train", 9, n)
        other = c.solve_one(n, problem, "x", {"threshold": threshold, "score": "likelihood"})
        tokens = c.answer.tokens
        c.solve_one(n, problem, way, {})
        assert tokens == c.answer.tokens and other["accepted"] == (threshold == 0) * other["drafted"]


def test_base_alone_is_generate():
    """A problem at a time and `generate` of the shared sampler draw the same tokens from the same numbers."""
    c = contest("--max_new_tokens 60")
    problem = c.prompter.task.problem("train", 9, 0)
    c.solve_one(5, problem, "base", {})
    a = c.answer
    uniforms = torch.from_numpy(sr.row_uniforms(0, 0, 5, 0, 60))[None]
    s = sr.generate(c.models[0], [a.prompt], uniforms)
    assert a.tokens[: int(s.lengths[0])] == s.tokens[0, : s.lengths[0]].tolist()


def test_caches_hold_the_kept_text_and_nothing_else(monkeypatch):
    """After a problem with refusals each cache equals that of one pass over the text it has read."""
    c = contest("--max_new_tokens 120 --gamma 3")
    c.quantiles = [-2.0, -0.5, -0.1]
    monkeypatch.setattr(c, "grade", None)  # no score asks the solver
    for settings in ({"threshold": 4.0, "score": "likelihood"}, {"threshold": 4.0, "score": "digit", "gamma": 3}):
        a = c.solve_one(1, c.prompter.task.problem("train", 9, 1), "x", settings)
        assert 0 < a["drafted"]
        text = c.answer.prompt + c.answer.tokens
        for reader in c.readers:
            known = min(reader.known, len(text))
            fresh = sr.Reader(reader.model, known + 1, c.size, c.cfg, (0, 0, 0, 0))
            fresh.read(text[:known])
            for name in ("keys", "values"):
                ours, right = (getattr(r.cache, name)[..., :known, :] for r in (reader, fresh))
                torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def test_reader_reads_only_what_is_new():
    c = contest()
    passes, reader = [], sr.Reader(c.models[0], 40, c.size, c.cfg, (0, 0, 0, 0))
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
    c, tokens = contest(), torch.arange(50, 80)[None]
    before = c.models[0](tokens)
    with torch.inference_mode(False):
        sr.deepen(c.models[0], 3)
    assert torch.equal(before, c.models[0](tokens)) and len(c.models[0].model["layers"]) == 9
    assert sr.Cache(c.models[0], 1, 4).keys.shape[0] == 9


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
    grade = lambda step, before="": task.grade_step(problem, before, step)  # noqa: E731
    assert grade("7+5*1=7+5=12>2\n") == 9 and grade("7+5*1=7+5=13>2\n") == 0 and grade("7+5*1=7+5=12<2\n") == 0
    assert grade("wait7+5*1=7+5=12>2\n", "7+5*1=7+5=12>2\n") == 5 and grade("7+7*1=7+7=14>2\n") == 0
    assert grade("</think><answer>7-5*1</answer>") == 9 and grade("</think><answer>7+5*1</answer>") == 0


def test_data_that_teaches(tmp_path):
    """Every step of a draft's answer with a solver's grade, behind what a perfect judge leaves of those before it."""
    steps = ["7+5*1=7+5=12>2\n", "7-5*1=7-5=3>2\n", "7+5*1=7+5=12>2\n", "</think><answer>7-5*1</answer>"]
    answer = {"prompt": "7,1,5=2<think>", "completion": "".join(steps)}
    (tmp_path / "drafted.jsonl").write_text(30 * (json.dumps(answer) + "\n"), encoding="utf-8")
    sr.graded_steps(str(tmp_path / "drafted.jsonl"), str(tmp_path / "judge.jsonl"), 0)
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
        sr.graded_steps(str(tmp_path / "drafted.jsonl"), str(tmp_path / "judge.jsonl"), 0)


def test_the_digit_is_that_of_a_plain_pass_and_leaves_no_trace():
    """Points of a step are eq. 2 of one pass without a cache; <score> is forgotten at once. Only the judge knows it."""
    c, problem = contest(), rewards.make_task("countdown").problem("train", 9, 0)
    c.readers = [sr.Reader(c.models[0], 100, c.size, c.cfg, (0, 0, 0, 0))]
    text, line = c.prompter.text(problem), c.prompter.task.trace(problem, Random(0)).partition("\n")[0] + "\n"
    text, step = c.prompter.encode(text), c.prompter.encode(line)
    points = c.points("digit", 0.5, text, step)
    logits = c.models[0].logits(c.models[0](torch.tensor([text + step + c.prompter.encode("<score>")])))[0, -1]
    digits = logits[c.digits].softmax(-1)
    assert points == pytest.approx(float(digits @ torch.arange(10.0)), abs=0.02)
    assert c.readers[0].known == len(text + step) and digits[[0, 5, 9]].sum() > 0.95
    assert c.knows_score()
    c.models = sr.load_model(sr.resolve_model("tiny-rl")), c.models[1]
    assert not c.knows_score()


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def go(cwd, capfd):
    def go(flags: str) -> SimpleNamespace:
        with torch.inference_mode(False):
            code = sr.main(sr.solve, sr.Config, flags.split())
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return go


def test_a_run_and_its_files(go, cwd):
    done = go(f"{SMALL} --out a")
    assert (done.code, done.err) == (0, "")
    assert {p.name for p in (cwd / "a").iterdir()} == {
        "run.json", "metrics.jsonl", "samples.jsonl", "specreason.py", "step-000002"
    }  # fmt: skip
    (line,) = lines_of(cwd / "a" / "metrics.jsonl")
    assert line["eval/problems/base"] == 2 and line["eval/problems/oracle"] == 1 and line["eval/speedup/base"] == 1
    for word in ("device", "cost   ms", "speculative decoding: alpha", "threshold 9", "coin", "points, above"):
        assert word in done.out, word
    (sample,) = lines_of(cwd / "a" / "samples.jsonl")
    assert len(sample["tokens"]) == len(sample["logprobs"]) and max(sample["logprobs"]) <= 0


def answers(folder: Path) -> list[dict]:
    """What a run knows of every problem, but for the times."""
    saved = json.loads(next(folder.glob("step-*")).joinpath("records.json").read_text())["records"]
    return [{way: {k: v for k, v in r.items() if "seconds" not in k} for way, r in row.items()} for row in saved]


def test_resume_goes_on_with_the_same_answers(go, cwd):
    assert go(f"{SMALL} --model tiny-judge --score digit --out whole --eval_problems 3").code == 0
    assert go(f"{SMALL} --model tiny-judge --score digit --out halves").code == 0
    assert go("--resume halves --eval_problems 3").code == 0
    assert answers(cwd / "whole") == answers(cwd / "halves")


@pytest.mark.slow
def test_torchrun_with_two_ranks(go, cwd):
    """Two processes share the problems; the answers are those of one."""
    flags = f"{SMALL} --eval_problems 3"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = finish(start("specreason", f"{flags} --out two", cwd, launch))
    assert done.code == 0 and done.out.count("speculative decoding: alpha") == 1, done.err
    assert go(f"{flags} --out one").code == 0 and answers(cwd / "one") == answers(cwd / "two")
    assert json.loads((cwd / "two" / "run.json").read_text(encoding="utf-8"))["ranks"] == 2


def test_vocabularies_of_two_sizes():
    models = [SimpleNamespace(config={"vocab_size": n}, vocab_bias=None, lm_head=SimpleNamespace(weight=torch.zeros(1)))
              for n in (12, 10)]  # fmt: skip
    models[1].vocab_bias = torch.tensor([0.0] * 9 + [-math.inf])
    assert sr.share_vocabulary(*models) == 10
    assert [m.vocab_bias.isinf().sum().item() for m in models] == [3, 1] and len(models[0].vocab_bias) == 12
