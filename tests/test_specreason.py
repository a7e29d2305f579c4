"""specreason.py: the reference's numbers (vectors/test_time.json), eq. 4 is exact, caches."""

import math
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import float64
from test_vectors import cases, check, near

import rewards
import specreason as sr


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def scripted(steps: list):
    """[text, tokens] as a list of so many pieces: the text, its tag apart, fillers, a delimiter."""
    for text, count in steps:
        words = [text]
        if text.endswith("</think>"):
            words = [text.removesuffix("</think>"), "</think>"]
        yield words + [""] * (count - len(words) - 1) + ["\n\n"]


@cases("test_time", "specreason")
def test_eq1_and_eq2_equal_the_reference(case):
    given, expected, prefixes = case["input"], case["expected"], []
    small, base = scripted(given["small_steps"]), scripted(given["base_steps"])
    tops = iter(given["score_logprobs"])

    def score(text, step):
        prefixes.append("".join(text + step))
        top = next(tops)
        words = [str(d) for d in range(10)] + sorted(w for w in top if not w.isdigit())
        logprobs = float64([top.get(word, -math.inf) for word in words])
        return sr.read_digit(logprobs, list(range(10)), given["score_method"])

    def finished(steps):
        texts = ["".join(step.tokens) for step in steps]
        same = len(texts) > 2 and texts[-1] == texts[-2]
        return same or any(mark in texts[-1] for mark in ("boxed", "Answer:", "ANSWER:"))

    def settle(length): ...

    limits = [given[name] for name in ("threshold", "first_n", "token_budget")]
    parts = lambda text: next(small), lambda text: next(base), score, finished, settle
    steps, reason = sr.reason(["<think>"], *parts, *limits, drop=("</think>",))
    refused = [s for s in steps if s.drafted and s.writer == "base"]
    found = {
        "steps": ["".join(s.tokens).removesuffix("\n\n") for s in steps],
        "writer": [s.writer.replace("draft", "small") for s in steps],
        "stop_reason": reason,
        "last_prefix_scored": prefixes[-1],
        "discarded_small_tokens": sum(len(s.drafted) for s in refused),
    }
    for name, value in found.items():
        check("test_time", case, value, expected[name])
    scores = zip([s.score for s in steps], expected["scores"], strict=True)
    assert all(a == b or a == pytest.approx(b, abs=1e-9) for a, b in scores)


@cases("test_time", "speculative_decoding", keep=lambda case: "p_target" in case["input"])
def test_eq4_probabilities_equal_the_reference(case):
    given, expected = case["input"], case["expected"]
    p, q = float64(given["p_target"]), float64(given["q_draft"])
    rates = expected["accept_prob_per_token"]
    rates = [math.nan if rate is None else rate for rate in rates]
    assert sr.acceptance(p, q).tolist() == pytest.approx(rates, abs=1e-9, nan_ok=True)
    near("test_time", case, sr.residual(p, q).tolist(), expected["residual"] or p.tolist(), 1e-9)


@cases("test_time", "speculative_decoding", keep=lambda case: "draft_tokens" in case["input"])
def test_eq4_a_round_equals_the_reference(case):
    given, expected = case["input"], case["expected"]
    p, q, uniforms = (float64(given[n]) for n in ("p_target_rows", "q_draft_rows", "uniforms"))
    kept, behind = sr.verify(p, q, torch.tensor(given["draft_tokens"]), uniforms)
    check("test_time", case, kept, expected["n_accepted"])
    near("test_time", case, behind.tolist(), expected["last_token_distribution"], 1e-9)


def test_eq3_by_hand():
    """Undecided between two: no excess surprise; sure of the first: the second is far below."""
    logits = torch.tensor([[0.0, 0.0, -30.0], [9.0, 0.0, -30.0]])
    assert sr.least_agreement(logits[:1], [1]) == pytest.approx(0.0, abs=1e-5)
    assert sr.least_agreement(logits, [0, 1]) == pytest.approx(-9.0, abs=0.01)


def test_temperature_and_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p, full = sr.distribution(logits, 0.5, 0.9), (logits / 0.5).softmax(-1)
    assert p[2:].tolist() == [0.0, 0.0] and p[0] == pytest.approx(float(full[0] / full[:2].sum()))
    assert sr.distribution(logits, 0.0).tolist() == [1.0, 0.0, 0.0, 0.0]


class Table:
    """In place of a Reader: a bigram model, a table of distributions (12, 12)."""

    def __init__(self, logits: torch.Tensor, seed: int):
        self.rows, self.known = logits.softmax(-1), 99
        self.random = np.random.default_rng(seed)

    def probs(self, text, count=1):
        return self.rows[text[-count:]]

    def uniforms(self, like, count):
        return like.new_tensor(self.random.random(count))

    def draw(self, probs):
        return int(sr.draw(probs[None], self.uniforms(probs, 1)[None]))

    def forget(self, length):
        self.known = min(self.known, length)


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    return p, 0.6 * p + 0.9 * noise


def test_eq4_is_exact():
    """Two tokens behind token 0, 2000 times, against their joint distribution: chi-square is below
    its 0.999 quantile (Wilson-Hilferty). Cells with an expectation below 5 are one."""
    (p, q), counts = tables(), np.zeros((12, 12))
    base, draft = Table(p, 1), Table(q, 2)
    for _ in range(2000):
        a, b = sr.write_speculatively(base, draft, [0], 2, set(), 2, [])
        counts[a, b] += 1
    probs = p.softmax(-1)
    expected = 2000 * (probs[0][:, None] * probs).flatten().numpy()
    rare, counts = expected < 5, counts.ravel()
    e = np.append(expected[~rare], expected[rare].sum())
    c = np.append(counts[~rare], counts[rare].sum())
    k = len(c) - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3
    assert ((c - e) ** 2 / e).sum() < limit


def test_a_step_cut_inside_a_round_leaves_no_trace():
    """Kept tokens beyond the limit of a step are not part of the text: both readers forget them."""
    p, _ = tables()
    base, draft, rounds = Table(p, 1), Table(p, 2), []
    assert len(sr.write_speculatively(base, draft, [0, 0], 2, set(), 4, rounds)) == 2
    assert rounds == [(4, 4)] and base.known == draft.known == 4


@pytest.fixture
def pair_of():
    """Makes a pair of models/tiny-judge and its draft."""

    def pair_of(flags: str = "", double: bool = False) -> sr.Pair:
        cfg = sr.parse_config(sr.Config, f"--model tiny-judge {flags}".split())
        run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), dtype=torch.float32)
        with torch.inference_mode(False):
            base = sr.Run.load(run, sr.BY_SIZE)[1]
            draft = sr.load_draft(run, base)
            if double:
                base.double(), draft.double()
            made = sr.Pair(cfg, base, draft, sr.Prompter(base, rewards.make_task(cfg.task), False))
        made.request = made.prompter.encode("<score>")
        made.own_steps = [-2.0, -0.5, -0.1]
        return made

    return pair_of


def training_problem(number: int) -> dict:
    return rewards.make_task("countdown").problem("train", 9, number)


def test_eq4_greedy_tokens_are_equal(pair_of):
    c = pair_of("--temperature 0 --max_new_tokens 60", double=True)
    for n in range(3):
        alone, _, _ = c.answer(n, training_problem(n))
        both, _, record = c.answer(n, training_problem(n), gamma=4)
        assert alone.tokens == both.tokens and record["rounds"] < 0.8 * len(alone.tokens)


def test_eq1_thresholds_beyond_the_scale_are_the_models_alone(pair_of):
    """All refused is the base, all kept the draft: as the shared sampler by the same numbers."""
    c = pair_of("--max_new_tokens 150")
    c.drop = ()
    for n in range(2):
        alone = c.answer(n, training_problem(n))[0]
        for threshold, model in ((10.0, c.base), (0.0, c.draft)):
            done, steps, record = c.answer(n, training_problem(n), c.points, threshold)
            uniforms = torch.tensor(sr.row_uniforms(0, int(model is c.draft), n, 0, 150))
            s = sr.generate(model, [done.prompt], uniforms[None])
            assert done.tokens == s.tokens[0, : s.lengths[0]].tolist()
            assert done.tokens == alone.tokens or model is c.draft
            assert record["accepted"] == (model is c.draft) * len(steps)
            assert done.finished == (done.tokens[-1] in c.eos)


@pytest.mark.parametrize("score, gamma", [("likelihood", 0), ("digit", 3)])
def test_caches_hold_the_kept_text_and_nothing_else(pair_of, monkeypatch, score, gamma):
    """After refusals each cache is that of one pass over the text its reader knows."""
    readers, make = [], sr.Reader

    def kept(*args):
        readers.append(make(*args))
        return readers[-1]

    monkeypatch.setattr(sr, "Reader", kept)
    # short steps, so that some are cut inside a round
    c = pair_of(f"--max_new_tokens 120 --max_step_tokens 13 --score {score}")
    done, _, record = c.answer(1, training_problem(1), c.points, 4.0, gamma=gamma)
    assert 0 < record["accepted"] < record["drafted"] and len(readers) == 2
    for reader in readers:
        text = (done.prompt + done.tokens)[: reader.known]
        fresh = make(reader.model, c.size, len(text), c.cfg, (0,))
        fresh.read(text)
        for name in ("keys", "values"):
            ours, right = (torch.stack(getattr(r.cache, name)) for r in (reader, fresh))
            torch.testing.assert_close(ours[..., : len(text), :], right, atol=1e-4, rtol=1e-4)


def test_eq2_the_digit_is_that_of_a_plain_pass(pair_of):
    """And <score> is forgotten at once."""
    c, problem = pair_of("--score digit"), training_problem(0)
    reader = sr.Reader(c.base, c.size, 100, c.cfg, (0,))
    line = c.prompter.task.trace(problem, Random(0)).partition("\n")[0] + "\n"
    text, step = map(c.prompter.encode, (c.prompter.text(problem), line))
    points = c.points(reader, text, step)
    asked = torch.tensor([text + step + c.request])
    digits = c.base.logits(c.base(asked))[0, -1][c.digits].softmax(-1)
    assert points == pytest.approx(float(digits @ torch.arange(10.0)), abs=0.02)
    assert reader.known == len(text + step) and digits[[0, 5, 9]].sum() > 0.95


def test_eq3_is_a_rank_among_the_bases_own_steps(pair_of):
    """As bad as the worst three of ten: 3 points."""
    c = pair_of("--max_new_tokens 20")
    c.own_steps = own = []
    c.calibrate()
    assert len(own) >= 24 and own == sorted(own) and own[-1] <= 0
    problem = c.prompter.task.problem("train", 0, 3)  # one of those it was calibrated on
    done, steps, _ = c.answer(3, problem)
    reader, text, logits = sr.Reader(c.base, c.size, 99, c.cfg, (0,)), done.prompt, c.reread(done)
    for tokens in [step.tokens for step in steps]:
        least = sr.least_agreement(logits[: len(tokens)], tokens)
        assert any(known == pytest.approx(least, abs=1e-4) for known in own)
        c.own_steps = [least - 0.1] * 3 + [least + 0.1] * 7
        assert c.points(reader, text, tokens) == 3
        text, logits = text + tokens, logits[len(tokens) :]


def test_comparison_by_hand():
    parts = ("draft", 5.0), ("base", 1.0), ("base", None)  # kept, refused, not asked
    steps = [sr.Step([7, 8], writer, score, [1, 2, 3]) for writer, score in parts]
    done = SimpleNamespace(score={"correct": True}, tokens=[0] * 6, finished=False)
    right = sr.count(done, steps, [(4, 2), (4, 4)]) | {"seconds": 2.0}
    wrong = right | {"accuracy": 0.0, "seconds": 4.0}
    pairs = (right, wrong), (right, right), (wrong, wrong)
    found = sr.compare([{"base": base, "x": x} for base, x in pairs] + [{"base": right}])
    expected = {"gap": -1 / 3, "gap_se": 1 / 3, "speedup": 0.8, "acceptance": 0.5, "alpha": 6 / 7}
    for name, value in expected.items():
        assert found[f"eval/{name}/x"] == pytest.approx(value), name
