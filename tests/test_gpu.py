"""tests/gpu.py on a CPU with a small shape: everything runs, and its checks can fail.

The captured step on a pretend device is in test_device.py.
"""

import gpu
import pytest
import torch

import grpo

FLAGS = "--batch_size 4 --group_size 2 --max_new_tokens 12"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    gpu.make_folder(folder, gpu.SMALL)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return gpu.load(grpo, folder, "cpu", FLAGS)


def test_everything_is_printed_and_held(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "gpu.py --device cpu --quick".split())
    assert gpu.main() == 0
    said = capsys.readouterr().out
    for name in ("captured = eager: 1.0000", "x generate", "useful TFLOP/s", "checkpointing False"):
        assert name in said


def test_checks_can_fail(loaded, folder, monkeypatch):
    _, model, _ = loaded
    prompts, other = gpu.make_prompts(model, 2, 9), grpo.load_model(folder)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight *= 3
    assert gpu.equal_tokens(model, prompts, 4, 20) == 1
    assert gpu.sampler_gap(model, model, prompts, 20)[1] < 1e-5
    mean, largest = gpu.sampler_gap(model, other, prompts, 20)
    assert 1e-4 < mean < largest
    real = gpu.eager
    monkeypatch.setattr(gpu, "eager", lambda model, *args: real(other, *args))
    assert gpu.equal_tokens(model, prompts, 4, 20) < 1
    monkeypatch.setattr(grpo, "load_model", lambda *args: other)
    assert gpu.logits_gap(folder, prompts, torch.device("cpu")) > 1e-3


def test_bytes_of_a_step(loaded):
    model = loaded[1]
    c = model.config
    token = 2 * 2 * c["num_key_value_heads"] * c["head_dim"] * 4  # keys, values; layers; float32
    assert gpu.bytes_read(model, 3, 50) == 4 * gpu.size_of(model) + 3 * 50 * token


def test_every_answer_of_a_step_is_trained(loaded, monkeypatch):
    """Useful FLOPs by the clock of a fake second."""
    trained, update = [], grpo.update_policy

    def noted(*args):
        trained.append(update(*args)["rows_trained"])

    monkeypatch.setattr(grpo, "update_policy", noted)
    monkeypatch.setattr(gpu, "seconds", lambda work, device: work() or 1.0)
    run, model, sampler = loaded
    found = gpu.step_table(run, model, sampler, 12)
    assert trained == [4, 4] and found["tokens"] == 48
    prompter = grpo.Prompter(model, gpu.make_task("countdown", natural=True), False)
    problem = prompter.task.problem("train", 0, 0)
    longest = len(prompter.encode(prompter.text(problem)))
    padded = found["useful TFLOP/s"] * 1e12 / 6 / gpu.size_of(model)
    assert padded == pytest.approx(4 * (longest + 12), rel=0.1)  # both prompts are about as long


def test_a_step_of_sft(folder, small, cwd):
    assert gpu.sft_step(small, "cpu", 6) > 0
