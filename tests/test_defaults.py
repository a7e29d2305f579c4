"""`python grpo.py --model Qwen2.5-1.5B --task countdown`: what it chooses, and that it fits.

The model is built on the meta device, with the sizes that Qwen2.5-1.5B's config.json has.
"""

import importlib

import pytest
import torch
from conftest import TRAINING

QWEN = {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28}
QWEN |= {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
QWEN |= {"vocab_size": 151936, "rope_theta": 1000000.0, "tie_word_embeddings": True}
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF["num_attention_heads"] = 14
TINY = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 230, "num_hidden_layers": 4}
LARGE = {"lr": 1e-6, "batch_size": 512, "max_new_tokens": 1024, "micro_batch_tokens": 10139}
CHOSEN = {"ppo": {"critic_lr": 1e-5, "repetition_n": 40, "micro_batch_tokens": 8192}}
CHOSEN["more.prime"] = {"prm_lr": 1e-6, "group_size": 8, "batch_size": 256}
CHOSEN["more.prime"]["micro_batch_tokens"] = 16384
ADDED = {"ppo": (30,), "more.prime": (32,)}  # bytes a parameter: a second model is trained, too
MODULES = {script: importlib.import_module(script) for script in TRAINING}
every = pytest.mark.parametrize("script", [s for s in MODULES if hasattr(MODULES[s], "rollout")])
# what trains on groups of its own answers
grouped = pytest.mark.parametrize(
    "script", [s for s in MODULES if hasattr(MODULES[s].Config, "group_size")]
)


@pytest.fixture
def load(monkeypatch):
    """Run.load on a pretended device: the run, the model to train, the one to sample from."""

    def load(script: str, device: str, flags: str = "", card: float = 85e9, **changes):
        """On a card with so many bytes; 600 MB are gone before the weights come."""
        module = MODULES[script]
        with torch.device("meta"):
            model = module.Model(QWEN | changes)
        monkeypatch.setattr(module, "resolve_model", str)
        monkeypatch.setattr(module, "load_model", lambda folder, device: model)
        free = card - 6e8 - 4 * sum(p.numel() for p in model.parameters())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(card)))
        run = module.Run.__new__(module.Run)
        run.rank, run.world, run.device = 0, 1, torch.device(device)
        run.cfg = module.parse_config(module.Config, flags.split())
        run.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return run, *run.load(module.BY_SIZE, *ADDED.get(script, ()))

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
    assert parameters == 1543714304 and model.checkpointing == (script in ADDED)
    # weights for Adam in float32, a copy in bfloat16 to sample from, products in bfloat16
    assert model.lm_head.weight.dtype == torch.float32 and model.compute_dtype == torch.bfloat16
    assert {(p.dtype, p.requires_grad) for p in sampler.parameters()} == {(torch.bfloat16, False)}

    row = (cfg.max_new_tokens + 256) * 2 * 28 * 2 * 128 * 2  # keys, values of 28 layers, 2 heads
    trained = 2 if script in ADDED else 1  # models in training: the critic, the PRM
    copies = 2 if script == "more.prime" else 1  # to sample from, the reference
    states = (16 * trained + 2 * copies) * parameters  # weight, gradient, two moments; copies
    layer = 10 * 1536 + 4 * 8960  # what the parts of a layer keep of a token
    kept = 28 * 1536 + layer if model.checkpointing else 28 * layer
    training = 2 * cfg.micro_batch_tokens * kept * trained + 16 * 85e9 / 160  # and logits
    assert states + training < 78e9
    assert (85e9 - 6e8 - states + 4 * parameters * trained) / 2 / row > cfg.batch_size


@every
def test_what_the_free_memory_decides(load, script):
    """The less, the smaller the micro-batch, down to 4096 tokens; then layers are computed again."""
    most = MODULES[script].BY_SIZE["micro_batch_tokens"][2]
    choices = []
    for card in (16e9, 24e9, 40e9, 48e9, 64e9, 85e9, 200e9):
        run, model, _ = load(script, "cuda", card=card)
        choices.append((model.checkpointing, run.cfg.micro_batch_tokens))
    again = [tokens for checkpointing, tokens in choices if checkpointing]
    whole = [tokens for checkpointing, tokens in choices if not checkpointing]
    assert choices == sorted(choices, key=lambda choice: not choice[0]) and again and whole
    assert set(again) == {most} and whole == sorted(whole) and whole[-1] == most
    assert whole[0] >= min(4096, most)
    run, model, _ = load(script, "cuda", "--micro_batch_tokens 512")
    assert run.cfg.micro_batch_tokens == 512
    run, model, _ = load(script, "cuda", **HALF)
    assert not model.checkpointing and run.cfg.micro_batch_tokens == most


@every
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_larger_the_model_the_lower_the_rate(load, script, device):
    """Three columns; given values stay; on a GPU the micro-batch is a GPU's, whatever the model."""
    by_size = MODULES[script].BY_SIZE
    assert list(by_size["lr"]) == sorted(by_size["lr"], reverse=True)
    for column, changes in enumerate((TINY, HALF, {})):
        run, model, sampler = load(script, device, "--batch_size 64", **changes)
        for name, values in by_size.items():
            expected = 64 if name == "batch_size" else values[column]
            if name != "micro_batch_tokens" or device == "cpu":
                assert getattr(run.cfg, name) == expected, name
        group = getattr(run.cfg, "group_size", 1)
        assert all(rows % group == 0 for rows in by_size["batch_size"])
        assert (sampler is model) == (device == "cpu")
        if device == "cpu":
            assert model.checkpointing == (column == 2)
