"""more/kinetics.py: the reference's costs, attention over what a rule keeps, counted keys, frontiers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_vectors import cases

from more import kinetics as kn
from rewards import BadInput, pass_at_k

QWEN = kn.Shape(0.752e9, 16 * 128 * 28, 8 * 128 * 28, 28)  # Qwen3-0.6B
RULE = kn.Rule("block", 4, 3, 4, 2)


def tera(cost, intensity: float) -> dict[str, float]:
    parts = cost[0], intensity * cost[1], kn.eflops(cost, intensity)
    names = "compute_tera_flops", "memory_tera_eflops", "total_tera_eflops"
    return dict(zip(names, (x / 1e12 for x in parts), strict=True))


@cases("test_time", "kinetics", keep=lambda case: "model" in case["input"])
def test_costs_equal_the_reference(case):
    x, repo = case["input"], case["repo"]
    size = x["head_dim"] * x["n_layers"]
    shape = kn.Shape(x["nparams"], x["n_heads"] * size, x["n_kv_heads"] * size, x["n_layers"])
    asked, trials = (shape, x["context"], x["generation"]), x["trials"]
    budget = x.get("budget", math.inf)
    if x["attention"] == "dense":
        closed, exact = (kn.dense_cost(*asked, trials, form) for form in (True, False))
        share = 1 - 2 * trials * shape.parameters * x["generation"] / kn.eflops(closed, x["intensity"])
        assert share == pytest.approx(repo["attention_share_of_total"], rel=1e-9)
    elif x["attention"] == "topk":
        closed, exact = (kn.sparse_cost(*asked, budget, trials, form) for form in (True, False))
    else:
        budget = x["local"] + x["block_size"] * x["block_topk"]
        sizes = budget, x["block_size"], trials
        closed, exact = (kn.block_cost(*asked, *sizes, form) for form in (True, False))
    assert closed[1] == pytest.approx(repo["memory_bytes"], rel=1e-9)
    assert kn.reads(*asked[1:], budget) == case["kv_token_reads_discrete"]
    assert 4 * shape.keys == repo["kv_bytes_per_token_bf16"]
    right = case.get("sign_corrected", repo)  # without the slip of the sign
    exact, closed = tera(exact, x["intensity"]), tera(closed, x["intensity"])
    assert closed == pytest.approx({name: repo[name] for name in closed}, rel=1e-9)
    assert exact == pytest.approx({name: right[name] for name in exact}, rel=1e-2)


@cases("test_time", "kinetics", keep=lambda case: "scores" in case["input"])
def test_coverage_equals_the_reference(case):
    scores = case["input"]["scores"]
    for n, expected in zip(case["input"]["n"], case["repo"]["coverage"], strict=True):
        assert pass_at_k(len(scores), sum(scores), n) == pytest.approx(expected, rel=1e-9)


def test_several_trials_by_hand():
    """3 trials of 2 tokens after 3: the prompt is read once, but by sparse ones three times."""
    shape = kn.Shape(0, 1, 1, 1)
    assert kn.dense_cost(shape, 3, 2, 3) == (3 * 4 * (2 * 3 + 1), 4 * (2 * 3 + 3 * 1))
    assert kn.sparse_cost(shape, 3, 2, 4, 3) == (3 * 4 * 7, 3 * 4 * 7)
    assert kn.block_cost(shape, 3, 2, 4, 2, 3) == (3 * 4 * 7 + 3 * 2 * (1 + 2),) * 2  # 3 // 2, 4 // 2
    assert kn.block_cost(shape, 3, 2, 4, 2, 3, closed=True)[1] == 12 * 7.5 + 2 * ((6 + 6) // 2 * 1)


def test_costs_grow_as_the_paper_says():
    """Twice as long: 4 times as dear, of a budget twice; most is attention; never less for more."""
    new = 32768
    dense = [kn.eflops(kn.dense_cost(QWEN, 128, n), 562.5) for n in (new, 2 * new)]
    sparse = [kn.eflops(kn.sparse_cost(QWEN, 128, n, 1024), 562.5) for n in (new, 2 * new)]
    assert dense[1] / dense[0] == pytest.approx(4, rel=0.02)
    assert sparse[1] / sparse[0] == pytest.approx(2, rel=0.02)
    assert 1 - 2 * QWEN.parameters * new / dense[0] > 0.97
    least = 128, 256, 64, 8, 1
    for i in range(5):  # larger blocks: less to search
        more = [2 * x if i == j else x for j, x in enumerate(least)]
        one, two = kn.block_cost(QWEN, *least), kn.block_cost(QWEN, *more)
        assert (two[0] > one[0], two[1] > one[1]) == (i != 3, i != 3)


def rows():
    """q, keys, values, lengths in float64: 5 rows, 6 query heads, 2 key heads."""
    torch.manual_seed(0)
    q, keys, values = torch.randn(5, 6, 1, 8), torch.randn(5, 2, 40, 8), torch.randn(5, 2, 40, 8)
    return q.double(), keys.double(), values.double(), torch.tensor([7, 16, 17, 29, 40])


def kept_by_loops(q, keys, length: int, rule, row: int, head: int) -> list[int]:
    """Eq. 6 and 7 of a row and a key head, position by position."""
    if length <= math.ceil((rule.sink + rule.recent + rule.k * rule.block) / rule.block) * rule.block:
        return list(range(length))
    blocks = (length - rule.sink - rule.recent) // rule.block
    logits = q[row, 3 * head : 3 * head + 3, 0] @ keys[row, head, :length].T  # (3, length)
    weight = ((logits / 8**0.5).softmax(-1) if rule.select == "oracle" else logits).mean(0)
    starts = [rule.sink + rule.block * j for j in range(blocks)]
    means = [float(weight[at : at + rule.block].mean()) for at in starts]
    scores = starts if rule.select == "window" else means
    best = sorted(range(blocks), key=scores.__getitem__)[-rule.k :]
    middle = [starts[j] + i for j in best for i in range(rule.block)]
    return sorted([*range(rule.sink), *middle, *range(rule.sink + rule.block * blocks, length)])


@pytest.mark.parametrize("select", kn.SELECT)
def test_eq6_eq7_attention_is_the_dense_one_over_what_is_kept(select):
    q, keys, values, lengths = rows()
    rule = replace(RULE, select=select)
    scores = kn.block_scores(q, keys, lengths, rule, 0)
    positions, counts = kn.chosen_blocks(scores, lengths, rule)
    found = kn.sparse_attention(q, keys, values, lengths, rule)
    kept, search = rule.count(lengths.numpy())
    for row, length in enumerate(lengths.tolist()):
        for head in (0, 1):
            at = sorted(positions[row, head][counts[row, head]].tolist())
            assert len(at) == len(set(at)) == kept[row] and at[-1] == length - 1
            if select != "random":
                assert at == kept_by_loops(q, keys, length, rule, row, head)
            logits = q[row, 3 * head : 3 * head + 3, 0] @ keys[row, head, at].T / 8**0.5
            expected = logits.softmax(-1) @ values[row, head, at]
            torch.testing.assert_close(found[row, 3 * head : 3 * head + 3, 0], expected)
    expected = {"block": [0, 0, 2, 5, 8], "oracle": [0, 0, 17, 29, 40]}.get(select, [0] * 5)
    assert kept.tolist() == [7, 16, 17, 17, 16] and search.tolist() == expected


@pytest.mark.parametrize("select", kn.SELECT)
def test_rows_are_independent(select):
    """Whatever lies beside a row, or behind its length."""
    q, keys, values, lengths = rows()
    rule = replace(RULE, select=select)
    together = kn.sparse_attention(q, keys, values, lengths, rule, 1)
    keys[3, :, 29:], values[3, :, 29:] = 1e6, 1e6
    alone = kn.sparse_attention(*(x[3:4] for x in (q, keys, values, lengths)), rule, 1)
    torch.testing.assert_close(alone[0], together[3])


def test_random_blocks_are_drawn_evenly_and_anew():
    lengths, rule = torch.arange(1000) + 44, replace(RULE, select="random")
    q, keys = torch.zeros(1000, 6, 1, 8), torch.zeros(1000, 2, 44, 8)
    scores = kn.block_scores(q, keys, lengths, rule, 0)  # (1000, 2, 10)
    best = torch.nn.functional.one_hot(scores.argmax(-1), 10).float().mean((0, 1))
    assert (best - 0.1).abs().max() < 0.03
    both = torch.stack([scores, kn.block_scores(q, keys, lengths, rule, 1)]).flatten(1)
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


@pytest.mark.parametrize("plain, layers, same", [(True, 0, True), (False, 6, True), (False, 0, False)])
def test_answers_are_the_dense_ones_if_all_is_read(monkeypatch, plain, layers, same):
    """By the layer's own products, positions and lengths; in all of its dense layers."""
    if plain:
        monkeypatch.setattr(kn, "sparse_attention", all_of_it)
    model = kn.load_model(ROOT / "models" / "tiny-rl").double()
    prompts = [model.tokenizer.encode(text).ids for text in ("8,5,5=65<think>", "7,1=2<think>")]
    uniforms = torch.from_numpy(np.random.default_rng(0).random((4, 60)))
    dense = kn.generate(model, prompts, uniforms)
    kn.sparsify(model, kn.Rule("block", 4, 4, 4, 1), layers)
    assert torch.equal(kn.generate(model, prompts, uniforms).tokens, dense.tokens) == same


def all_of_it(q, keys, values, lengths, rule, layer):
    mask = (torch.arange(keys.shape[2]) < lengths[:, None])[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def test_cost_curve_by_hand():
    """Of 20, 21 .. keys; the first token reads all; half of the layers are dense."""
    shape = kn.Shape(10, 2, 3, 2)
    assert [x.tolist() for x in RULE.count(np.array([21, 22]))] == [[17, 18], [3, 3]]
    flops, read = kn.cost_curve(shape, RULE, 20, 3)
    assert read.tolist() == [240, 240 + 222, 240 + 222 + 234]
    assert flops.tolist() == np.cumsum([20 + 160, 20 + 2 * 74, 20 + 2 * 78]).tolist()
    assert kn.cost_curve(shape, None, 20, 3)[1][-1] == kn.dense_cost(shape, 20, 3)[1]
    assert kn.cost_curve(shape, RULE, 20, 2, 1)[1][-1] == 240 + 3 * (84 + 74) / 2


def test_trade_and_frontier_by_hand():
    """Two answers, the right one of 3 tokens, cost a token each; a cap of 2 cuts it."""
    record, curve = {"prompt": 1, "tokens": [3, 1], "right": [1, 0]}, (np.arange(1.0, 5), np.zeros(4))
    points = kn.trade([{"dense": record}], lambda way, context: curve, [2, 3], 1.0)
    assert points == {"dense/2/1": (1.5, 0), "dense/2/2": (3, 0), "dense/3/1": (2, 0.5), "dense/3/2": (4, 1)}
    assert kn.frontier(points) == ["dense/3/1", "dense/3/2"]
    assert kn.frontier({"a": (1.0, 0.5), "b": (1.0, 0.6), "c": (2.0, 0.6)}) == ["b"]


def test_shapes_come_from_config_json(tmp_path):
    shape, model = kn.read_shape("tiny-rl"), kn.load_model(ROOT / "models" / "tiny-rl")
    assert shape == kn.Shape(sum(p.numel() for p in model.parameters()), 768, 384, 6)
    config = model.config | {"tie_word_embeddings": False}
    assert kn.shape_of(config) == shape  # the head multiplies, the table of embeddings does not
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    with pytest.raises(BadInput, match="no multiple of 3"):
        kn.read_shape(str(tmp_path))
    flags = "--shapes tiny-rl --context 20 --new 64 --trials 3 --rows 2".split()
    heads, line = kn.cost_table(kn.parse_config(kn.Config, flags)).split("\n")
    found = dict(zip(heads.split(), line.split()[1:], strict=True))
    flops, read = kn.dense_cost(shape, 20, 64, 3)
    weights = 2 * shape.parameters * 64 * 3  # FLOP; bytes shared by two
    total, rest = flops + 562.5 * (read + weights / 2), weights + 562.5 * weights / 2
    assert float(found["TB"]) == pytest.approx((read + weights / 2) / 1e12, rel=1e-4)
    assert float(found["attention"]) == pytest.approx(1 - rest / total, rel=1e-4)
