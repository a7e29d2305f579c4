"""`python grpo.py --model Qwen2.5-1.5B --task countdown`: what it chooses, and that it fits.

The model is built on the meta device, with the sizes that Qwen2.5-1.5B's config.json has.
"""

import importlib

import pytest
import torch
from conftest import TRAINING

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF["num_attention_heads"] = 14
TINY = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 230, "num_hidden_layers": 4}
LARGE = {"lr": 1e-6, "batch_size": 512, "max_new_tokens": 1024, "micro_batch_tokens": 16384}
CHOSEN = {"ppo": {"critic_lr": 1e-5, "repetition_n": 40}}  # beyond LARGE
MODULES = {script: importlib.import_module(script) for script in TRAINING}
every = pytest.mark.parametrize("script", [s for s in MODULES if hasattr(MODULES[s], "rollout")])
# what trains on groups of its own answers
grouped = pytest.mark.parametrize(
    "script", [s for s in MODULES if hasattr(MODULES[s].Config, "group_size")]
)


@pytest.fixture
def load(monkeypatch):
    """Run.load on a pretended device: the run, the model to train, the one to sample from."""

    def load(script: str, device: str, flags: str = "", **changes):
        module = MODULES[script]
        with torch.device("meta"):
            model = module.Model(QWEN | changes)
        monkeypatch.setattr(module, "resolve_model", str)
        monkeypatch.setattr(module, "load_model", lambda folder, device: model)
        run = module.Run.__new__(module.Run)
        run.rank, run.world, run.device = 0, 1, torch.device(device)
        run.cfg = module.parse_config(module.Config, flags.split())
        run.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return run, *run.load(module.BY_SIZE)

    return load


@grouped
def test_a_run_that_an_expert_would_have_configured_fits_one_card(load, script):
    """80 GB: the parts that are there at once, for prompts of 256 tokens."""
    run, model, sampler = load(script, "cuda", "--model Qwen2.5-1.5B --task countdown")
    chosen, cfg = LARGE | CHOSEN.get(script, {}), run.cfg
    assert {name: getattr(cfg, name) for name in MODULES[script].BY_SIZE} == chosen
    MODULES[script].check_flags(cfg)
    assert cfg.batch_size == 32 * cfg.group_size
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 1543714304 and model.checkpointing
    # weights for Adam in float32, a copy in bfloat16 to sample from, products in bfloat16
    assert model.lm_head.weight.dtype == torch.float32 and model.compute_dtype == torch.bfloat16
    assert {(p.dtype, p.requires_grad) for p in sampler.parameters()} == {(torch.bfloat16, False)}

    rows = MODULES[script].rows_at_once(sampler, cfg.max_new_tokens + 256)
    assert rows >= cfg.batch_size  # all rows of a step are sampled together
    token = 2 * 28 * 2 * 128 * 2  # keys and values of 28 layers, 2 heads of 128, in bfloat16
    cache = rows * (cfg.max_new_tokens + 256) * token
    activations = 3 * cfg.micro_batch_tokens * 28 * 1536 * 2  # the inputs of the layers
    logits = 12 * 2**26  # at a time, in float32, with their gradient and softmax
    trained = 2 if script == "ppo" else 1  # models in training: the critic is one more
    weights = (16 * trained + 2) * parameters  # weight, gradient, two moments; the copy
    assert weights + cache + activations + logits < 80e9


@every
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_larger_the_model_the_lower_the_rate(load, script, device):
    """Three columns; given values stay; on a GPU the micro-batch is a GPU's, whatever the model."""
    by_size = MODULES[script].BY_SIZE
    assert list(by_size["lr"]) == sorted(by_size["lr"], reverse=True)
    for column, changes in enumerate((TINY, HALF, {})):
        run, model, sampler = load(script, device, "--batch_size 64", **changes)
        for name, values in by_size.items():
            large = device == "cuda" and name == "micro_batch_tokens"
            expected = 64 if name == "batch_size" else values[2 if large else column]
            assert getattr(run.cfg, name) == expected, name
        group = getattr(run.cfg, "group_size", 1)
        assert all(rows % group == 0 for rows in by_size["batch_size"])
        assert (sampler is model) == (device == "cpu") and model.checkpointing == (column == 2)


@every
def test_rows_at_once(load, script):
    """As many rows as 1 GB of cache holds on a CPU, at most 256; 20 GB elsewhere."""
    _, _, model = load(script, "cuda")  # a token: 28 KiB in bfloat16
    rows = MODULES[script].rows_at_once
    assert [rows(model, n) for n in (1000, 10000)] == [697, 69]
    model.lm_head = torch.nn.Linear(1, 1)  # stands on the CPU
    assert [rows(model, n) for n in (100, 2000, 4000)] == [256, 17, 8]
