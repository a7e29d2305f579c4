"""`python grpo.py --model Qwen2.5-1.5B --task countdown` with no further flag: what it chooses, and that it fits.

The model is built on the meta device, with the sizes that Qwen2.5-1.5B's config.json has, and no weights.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

QWEN = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
# embeddings, and per layer: q and o, k and v, three of the MLP, biases of q, k and v, two norms; the last norm
ATTENTION = 2 * 1536 * 1536 + 2 * 1536 * 256 + 1536 + 2 * 256
PARAMETERS = 151936 * 1536 + 28 * (ATTENTION + 3 * 1536 * 8960 + 2 * 1536) + 1536
CHOSEN = {
    "grpo": {"lr": 1e-6, "batch_size": 512, "max_new_tokens": 1024, "micro_batch_tokens": 16384},
    "nsr": {"lr": 1e-6, "batch_size": 512, "max_new_tokens": 1024, "micro_batch_tokens": 16384},
    "ppo": {
        "lr": 1e-6,
        "critic_lr": 1e-5,
        "batch_size": 512,
        "max_new_tokens": 1024,
        "micro_batch_tokens": 16384,
        "repetition_n": 40,
    },
    "coconut": {"lr": 2e-5, "batch_size": 128, "max_new_tokens": 128, "micro_batch_tokens": 4096},
    "sft": {"lr": 2e-5, "batch_size": 64, "max_new_tokens": 1024, "micro_batch_tokens": 16384},
}
GB = 1e9


def module(script):
    return importlib.import_module(script)


def model_of(script, **changes):
    """A model on the meta device, set up as Run.load does on a GPU."""
    with torch.device("meta"):
        model = module(script).Model(QWEN | changes)
    model.compute_dtype, model.checkpointing = torch.bfloat16, module(script).num_parameters(model) >= 1e9
    return model


def choose(script, model, flags=()):
    """The settings of a command line, and what was chosen by model size among them."""
    cfg = module(script).parse_config(module(script).Config, list(flags))
    run = SimpleNamespace(cfg=cfg, world=1, rank=0, device=torch.device("cuda"), dtype=torch.bfloat16)
    return cfg, module(script).Run.choose(run, model, module(script).BY_SIZE)


def plan_of(script, cfg, model):
    """The plan that a run prints, for a prompt of 256 tokens."""
    capacity = cfg.max_new_tokens + 256
    rows = module(script).rows_at_once(model, capacity)
    return module(script).memory_plan(model, rows, capacity, cfg.micro_batch_tokens, torch.bfloat16)


@pytest.mark.parametrize("script", CHOSEN)
def test_chosen_values(script):
    command = ["--model", "Qwen2.5-1.5B", "--task", "countdown"]
    cfg, chosen = choose(script, model_of(script), command)
    assert chosen == CHOSEN[script]
    assert {name: getattr(cfg, name) for name in chosen} == chosen
    if script not in ("sft", "coconut"):
        module(script).check_flags(cfg)
        assert cfg.batch_size % (cfg.group_size * getattr(cfg, "updates", 1)) == 0
        assert cfg.batch_size // cfg.group_size == 32  # prompts a step


@pytest.mark.parametrize("script", CHOSEN)
def test_given_values_stay(script):
    _, chosen = choose(script, model_of(script), ["--lr", "0.003", "--batch_size", "64"])
    assert set(chosen) == set(CHOSEN[script]) - {"lr", "batch_size"}


@pytest.mark.parametrize("script", SMALL)
def test_sizes(script):
    """Three columns, each of them a batch that the default group size divides; the larger the model, the lower lr."""
    by_size = module(script).BY_SIZE
    assert set(by_size) == set(CHOSEN[script])
    assert list(by_size["lr"]) == sorted(by_size["lr"], reverse=True)
    group = getattr(module(script).Config(), "group_size", 1)
    assert all(len(values) == 3 for values in by_size.values()) and not any(n % group for n in by_size["batch_size"])
    tiny = model_of(script, hidden_size=128, intermediate_size=256, vocab_size=230, num_attention_heads=4)
    half = model_of(script, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
    for column, model in enumerate((tiny, half, model_of(script))):
        assert choose(script, model)[1] == {name: values[column] for name, values in by_size.items()}


@pytest.mark.parametrize("script", CHOSEN)
def test_plan_fits_one_card(script):
    model = model_of(script)
    assert module(script).num_parameters(model) == PARAMETERS == 1543714304
    cfg, _ = choose(script, model)
    plan = plan_of(script, cfg, model)
    assert plan["all"] == pytest.approx(sum(value for name, value in plan.items() if name != "all"), abs=0.02)
    assert plan["all"] < 80  # GB
    # weights, gradients and two moments in float32: 4 + 4 + 8 bytes a parameter
    assert plan["weights, gradients, Adam"] == pytest.approx(16 * PARAMETERS / GB, abs=0.001)
    assert plan["weights, gradients, Adam"] == pytest.approx(24.70, abs=0.01)
    assert plan["sampling copy"] == pytest.approx(3.087, abs=0.001)  # bfloat16
    # a token's keys and values: 2 x 28 layers x 2 heads x 128 x 2 bytes
    per_token = 2 * 28 * 2 * 128 * 2
    assert per_token == 28 * 1024
    assert plan["KV cache"] == pytest.approx(256 * (cfg.max_new_tokens + 256) * per_token / GB, abs=0.001)
    # with checkpointing: the input of each layer, and the inside of one
    least = cfg.micro_batch_tokens * 28 * 1536 * 2 / GB
    assert least < plan["activations"] < 3 * least
    # at most 2^26 logits at a time, in float32, with their gradient and softmax
    assert plan["logits"] == pytest.approx(12 * 2**26 / GB, abs=0.001)


def test_specreason_on_qwen():
    """Its draft and budgets, and ids that only one of two models has: masked in both."""
    sr, base, draft = module("specreason"), model_of("specreason"), model_of("specreason", vocab_size=152064)
    cfg, chosen = choose("specreason", base, ["--model", "Qwen2.5-1.5B", "--task", "countdown"])
    assert chosen == {"max_new_tokens": 2048, "max_step_tokens": 512}
    assert sr.choose_draft(cfg, base) == "Qwen2.5-0.5B"
    bias = torch.zeros(151936)
    bias[151665:] = -torch.inf  # beyond the tokenizer
    base.vocab_bias, base.lm_head, draft.lm_head = bias, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert sr.share_vocabulary(base, draft) == 151936
    for model, size in ((base, 151936), (draft, 152064)):
        assert len(model.vocab_bias) == size and model.vocab_bias.isinf().nonzero()[0, 0] == 151665
        assert model.vocab_bias.isinf().sum() == size - 151665


def test_plan_of_the_parts_that_were_measured():
    """Without checkpointing every layer keeps its inside; in float32 there is no second copy to sample from."""
    grpo, model = module("grpo"), model_of("grpo")
    cfg, _ = choose("grpo", model)
    small = plan_of("grpo", cfg, model)["activations"]
    model.checkpointing = False
    assert plan_of("grpo", cfg, model)["activations"] > 10 * small
    wide = grpo.memory_plan(model, 8, 512, 4096, torch.float32)
    assert wide["sampling copy"] == 0
    assert wide["KV cache"] == pytest.approx(8 * 512 * 2 * 28 * 1024 / GB, abs=0.001)


def test_rows_at_once():
    """As many rows as 1 GB of cache holds on a CPU, 20 GB elsewhere, at most 256, at least one."""
    grpo, model = module("grpo"), model_of("grpo")  # a token: 28 KiB in bfloat16
    assert [grpo.rows_at_once(model, n) for n in (100, 2000, 4000, 10**6)] == [256, 256, 174, 1]
    model.lm_head = torch.nn.Linear(1, 1)  # stands on the CPU
    assert [grpo.rows_at_once(model, n) for n in (100, 2000, 4000, 10**6)] == [256, 17, 8, 1]


def test_budget_forcing():
    """Evaluates only: budgets up to the context that such models think in, an answer behind the largest, one card."""
    bf, model = module("budget_forcing"), model_of("budget_forcing")
    cfg, chosen = choose("budget_forcing", model, ["--model", "Qwen2.5-1.5B", "--task", "countdown"])
    assert chosen == {"caps": "256,512,1024,2048,4096", "max_new_tokens": 4608}
    assert bf.numbers(cfg.caps, "caps")[-1] + 512 == cfg.max_new_tokens
    assert bf.rows_at_once(model, 256 + cfg.max_new_tokens) >= 64
    plan = plan_of("budget_forcing", cfg, model)
    assert plan["all"] < 80 and plan["weights"] == pytest.approx(4 * PARAMETERS / GB, abs=0.001)  # no gradients
    assert plan["activations"] == plan["logits"] == 0
    assert all(bf.numbers(caps, "caps")[-1] < most for caps, most in zip(*bf.BY_SIZE.values(), strict=True))
