"""tests/bench.py: its counts against counts by hand, and a quick run of every section."""

import json
from types import SimpleNamespace

import bench
import pytest
import torch

TINY = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 2, "vocab_size": 5}
# Products of a layer per token: q 4 x 4, k and v 4 x 2, o 4 x 4, gate and up 4 x 6, down 6 x 4:
# 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120. So a token costs 2 layers x 2 x 120 = 480, a head position 2 x 4 x 5 = 40, and a
# pair of a query and a key 2 layers x 2 heads x (2 x 2 for the score + 2 x 2 for the sum) = 32.
DIFFERENCES = {"decode", "share", "cost/token x", "Python share", "(profiled)"}  # of times: noise may turn their sign


def test_flops_by_hand():
    assert bench.flops(TINY, [bench.Pass(tokens=1, head=0, pairs=0)]) == 480
    assert bench.flops(TINY, [bench.Pass(tokens=0, head=1, pairs=0)]) == 40
    assert bench.flops(TINY, [bench.Pass(tokens=0, head=0, pairs=1)]) == 32
    assert bench.flops(TINY, [bench.Pass(7, 5, 3), bench.Pass(1, 1, 1, times=3)]) == 7 * 480 + 5 * 40 + 3 * 32 + 3 * 552
    assert bench.weight_bytes(TINY) == 4 * (2 * 120 + 4 * 5)


def test_sampling_passes_by_hand():
    """Prompts of 3 and 2 tokens, two rows each, of 1, 3, 2 and 2 tokens."""
    passes = bench.sampling_passes([3, 2], [1, 3, 2, 2])
    # prefill: 5 tokens, 2 last positions, 3 + 2 + 1 and 2 + 1 pairs. Then three rows go on, seeing 3 + 1, 2 + 1 and
    # 2 + 1 keys, and at last one, seeing 3 + 2
    assert passes == [(5, 2, 9, 0, 1), (3, 3, 10, 10, 1), (1, 1, 5, 5, 1)]
    assert bench.flops(TINY, passes) == 9 * 480 + 6 * 40 + 24 * 32
    # weights thrice, and 15 positions read, each 2 layers x (key + value) x 1 head x 2 numbers x 4 bytes
    assert bench.moved_bytes(TINY, passes) == 3 * bench.weight_bytes(TINY) + 15 * 32


def test_training_passes_by_hand():
    """Prompts of 3 and 2 tokens, answers of 1, 3 and 2, 2: each prompt but its last token once, 2 + (1 + 3) inputs
    and 1 + (2 + 2); every token of an answer is predicted, and sees the prompt and what stands before it.
    """
    run = SimpleNamespace(cfg=SimpleNamespace(micro_batch_tokens=1000), device=torch.device("cpu"))
    rows = [(0, 3, 1), (0, 3, 3), (1, 2, 2), (1, 2, 2)]
    done = [SimpleNamespace(number=i, prompt=[5] * p, tokens=[6] * n) for i, p, n in rows]
    first, second = 3 + (2 + 1) + (6 + 6), 1 + 2 * (2 + 3)
    passes = bench.training_passes(run, done)
    assert passes == [(6, 4, first, 0, 3), (5, 4, second, 0, 3)]
    assert bench.flops(TINY, passes) == 3 * (11 * 480 + 8 * 40 + (first + second) * 32)


class Even(bench.Machine):
    """A machine of 1000 FLOP/s for all shapes, and 100 bytes/s."""

    def __init__(self):
        self.sizes, self.flop_rate, self.bandwidth = bench.QUICK, 1000.0, 100.0

    def rate(self, m: int, k: int, n: int) -> float:
        return 1000.0


def test_bounds_are_the_counts_over_the_rates():
    passes = bench.sampling_passes([3, 2], [1, 3, 2, 2])
    count = bench.flops(TINY, passes)
    assert Even().gemm_bound(TINY, passes) == pytest.approx(count / 1000)
    assert Even().gemm_bound(TINY, [bench.Pass(2, 1, 1, times=3)]) == pytest.approx(3 * (2 * 480 + 40 + 32) / 1000)
    one = bench.flops(TINY, passes[2:])  # the step of one row is bound by the weights
    by_bytes = Even().sampling_bound(TINY, passes)
    assert by_bytes == pytest.approx((count - one) / 1000 + bench.weight_bytes(TINY) / 100)
    assert Even().rule_of_thumb(50, [bench.Pass(2, 1, 1, times=3)]) == pytest.approx(2 * 50 * 2 * 3 / 1000)


def test_counts_agree_with_the_model():
    """One product per weight matrix, as torch itself counts them (attention aside, whose causal half we count)."""
    from torch.utils.flop_counter import FlopCounterMode

    import grpo

    settings = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False}
    model, tokens = grpo.Model(TINY | settings), torch.tensor([[1, 2, 3]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens))
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    linear = sum(count for op, count in found.items() if "attention" not in op and "bmm" not in op)
    assert linear == bench.flops(TINY, [bench.Pass(3, 3, 0)])


def test_alternate_takes_medians_in_turn(monkeypatch):
    clock, order = [0.0], []
    durations = {"a": [1.0, 9.0, 2.0], "b": [5.0, 4.0, 6.0]}

    def work(name):
        order.append(name)
        clock[0] += durations[name].pop(0)

    monkeypatch.setattr(bench, "now", lambda: clock[0])
    assert bench.alternate([lambda: work("a"), lambda: work("b")], 3) == [2.0, 5.0]
    assert order == list("ababab")


def test_quick_run(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SMOLLM2", raising=False)
    path = tmp_path / "found.json"
    assert bench.main(["--quick", "--json", str(path)]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    rows = found["rows"]
    assert {row["section"] for row in rows} == set(bench.SECTIONS)
    for row in rows:
        assert row["case"] in out
        for name, value in row.items():
            if isinstance(value, float) and name not in DIFFERENCES:
                assert value > 0 or row["case"].startswith("score"), row
            if name == "share" and {"bound", "seconds"} <= set(row):
                assert value == pytest.approx(row["bound"] / row["seconds"])
    sample, score, train, whole = (row for row in rows if row["section"] == "step" and "seconds" in row)
    for name in ("seconds", "bound", "2PT", "GFLOP"):
        assert whole[name] == pytest.approx(sample[name] + score[name] + train[name]), name
    memory = next(row for row in rows if row["case"].startswith("memory"))
    assert 0.05 < memory["training GB"] < 50
    for row in rows:
        if row["section"] == "sampler":
            assert row["ratio"] == pytest.approx(row["tokens/s"] / row["generate"])
            assert row["same"] in (None, 1.0), "greedy tokens differ from those of transformers"
    overhead = next(row for row in rows if row["section"] == "overhead")
    assert overhead["Python share"] == pytest.approx(1 - overhead["replay ms"] / overhead["step ms"])
    assert [t["target"] for t in found["targets"]] and "Python in a decode step" in out


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "sampling"])
    assert "one of rates, step" in capsys.readouterr().err
