"""tests/bench.py: its counts against counts by hand, and a quick run of every section."""

import json
from types import SimpleNamespace

import bench
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

TINY = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "vocab_size": 5}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}


class Even(bench.Machine):
    """A machine of one FLOP/s for all shapes, and one byte/s: its bounds are the counts."""

    def __init__(self):
        self.flop_rate = self.bandwidth = 1.0

    def rate(self, m: int, k: int, n: int) -> float:
        return 1.0


def test_counts_agree_with_the_model():
    """As torch itself counts the products of the model, attention aside, which is by hand."""
    settings = {"model_type": "llama", "rope_theta": 100.0, "tie_word_embeddings": False}
    model, tokens = bench.grpo.Model(TINY | settings), torch.tensor([[1, 2, 3]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens))
    counts = counter.get_flop_counts()["Global"].items()
    linear = [n for op, n in counts if "attention" not in str(op) and "bmm" not in str(op)]
    assert sum(linear) == Even().gemm_bound(TINY, [bench.Pass(3, 3, 0)]) == 3 * 480 + 3 * 40
    # 2 layers x 2 heads x (4 for the score + 4 for the sum) a pair; three times with backward
    assert Even().gemm_bound(TINY, [bench.Pass(7, 5, 3, 3)]) == 3 * (7 * 480 + 5 * 40 + 3 * 32)


def test_sampling_passes_by_hand():
    """Prompts of 3 and 2 tokens, two rows each, of 1, 3, 2 and 2 tokens."""
    passes = bench.sampling_passes([3, 2], [1, 3, 2, 2])
    # prefill: 5 tokens, 2 last positions, 3 + 2 + 1 and 2 + 1 pairs. Then three rows go on, seeing
    # 3 + 1, 2 + 1 and 2 + 1 keys, and at last one, seeing 3 + 2
    assert passes == [(5, 2, 9, 1), (3, 3, 10, 1), (1, 1, 5, 1)]
    wide = 8 * 480 + 5 * 40 + 19 * 32  # the step of one row is bound by the weights, float32
    assert Even().sampling_bound(TINY, passes) == wide + 4 * (2 * 120 + 4 * 5)


def test_training_passes_by_hand():
    """Every token of an answer is predicted; the inputs are all tokens but the last."""
    cfg = SimpleNamespace(micro_batch_tokens=12)
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), rank=0, world=1)
    rows = [(3, 1), (3, 3), (2, 2), (2, 2)]
    done = [SimpleNamespace(prompt=[5] * p, tokens=[6] * n) for p, n in rows]
    passes = bench.training_passes(run, done)
    assert passes == [(5 + 3, 3 + 1, 15 + 6, 3), (3 + 3, 2 + 2, 6 + 6, 3)]


def test_quick_run(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SMOLLM2", raising=False)
    path = tmp_path / "found.json"
    assert bench.main(["--quick", "--json", str(path)]) == 0
    out, rows = capsys.readouterr().out, json.loads(path.read_text())["rows"]
    assert {row["section"] for row in rows} == set(bench.SECTIONS)
    for row in rows:
        assert row["case"] in out and row["seconds"] > 0 and row["bound"] > 0
        assert row["share"] == pytest.approx(row["bound"] / row["seconds"])
        assert row.get("same", 1) == 1, "greedy tokens differ from those of transformers"
        assert 0.05 < row.get("GB", 1) < 50
