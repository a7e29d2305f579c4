"""sft.py's own functions: loss and schedule as the reference's, traces, masks, data files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import vectors

import rewards
import sft

VECTORS = vectors("sft_data")
LOGITS = VECTORS.get("loss_normalisation", {}).get("logits", [])
END = [1]


@pytest.fixture(scope="module")
def prompter(small) -> "sft.Prompter":
    return sft.Prompter(sft.load_model(small), rewards.make_task("countdown"), chat=False)


@pytest.mark.parametrize("case", LOGITS, ids=lambda c: c["id"])
def test_eq1_loss_and_gradient_from_logits_equal_the_reference(case):
    names, total, squares = ("logits", "labels"), 0.0, 0.0
    micro = [[torch.tensor(part[name]) for name in names] for part in case["micro_batches"]]
    num_tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in micro)
    for logits, labels in micro:
        logits, labels = logits.double().requires_grad_(), labels[:, 1:, None]
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0))
        loss = sft.sft_loss(logprobs * (labels != -100), num_tokens)
        loss.backward()
        total += loss.item()
        squares += logits.grad.square().sum().item()
    assert total == pytest.approx(case["right"], rel=1e-6)
    assert squares**0.5 == pytest.approx(case["grad_l2_right"], rel=1e-6)


@pytest.mark.parametrize("case", VECTORS.get("lr_schedule", []))
def test_learning_rate_equals_the_reference(case):
    for step, expected in case["lr_at"].items():
        ours = sft.learning_rate(int(step), case["total_steps"], case["peak"], case["warmup_steps"])
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18)


LEARNT = {"completion": "a\nb\n</think>c<eos>", "all": "1=a\nb\n</think>c<eos>"}
LEARNT |= {"thought": "a\nb\n</think>", "answer": "c<eos>"}


@pytest.mark.parametrize("loss_on", LEARNT)
def test_eq1_mask_is_1_on_what_is_learnt(prompter, loss_on):
    example = {"prompt": "1=", "completion": "a\nb\n</think>c"}
    ids, mask = sft.make_row(prompter, example, loss_on, END)
    assert prompter.decode(ids) == "1=a\nb\n</think>c<eos>" and len(mask) == len(ids)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert prompter.decode(learnt) == LEARNT[loss_on]


def test_a_trace_depends_on_seed_and_number_and_survives_the_tokenizer(prompter):
    """It decodes to itself and has no unknown token."""
    rows = set()
    for seed, index in [(1, 3), *((0, i) for i in range(30)), (0, 3)]:
        example = sft.trace_example(prompter, seed, index)
        ids, mask = sft.make_row(prompter, example, "completion", END)
        given = prompter.encode(prompter.text(prompter.task.problem("train", seed, index)))
        assert ids[: len(given)] == given and ids[-1:] == END
        assert mask == [0] * len(given) + [1] * (len(ids) - len(given))
        assert prompter.encode(prompter.decode(ids[:-1])) == ids[:-1] and 2 not in ids  # <unk>
        rows.add(tuple(ids))
    assert len(rows) == 31  # the last one was there
    everything = "".join(map(chr, range(32, 127))) + "\n"
    assert prompter.decode(prompter.encode(everything)) == everything


def test_the_tiny_vocabulary_is_fixed(prompter, small, tmp_path):
    """Later scripts rely on these ids; what no trace uses is never sampled."""
    words = "<pad> <eos> <unk> <think> </think> <answer> </answer> <score> <bot> <eot>".split()
    words += ["<latent>", "wait"]
    assert [prompter.tokenizer.token_to_id(word) for word in words] == list(range(12))
    assert prompter.tokenizer.get_vocab_size() == 12 + 32 + 1 + 95 + 90
    assert len(prompter.encode("10+99=1234")) == 3 + 1 + 4  # 10 + 99 = and four digits
    model = sft.load_model(small)
    never = set((model.vocab_bias == -torch.inf).nonzero()[:, 0].tolist())
    assert never == {0, 2, 7, 8, 9, 10, *range(12, 44)} and model.eos_ids == [1] and model.is_tiny
    sft.make_tiny(tmp_path, sft.Config(num_layers=2, hidden_size=32, seed=1))
    made, kept = ((f / "model.safetensors").read_bytes() for f in (tmp_path, small))
    assert made != kept  # another seed, other weights


def write(folder: Path, *lines: dict) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "a.jsonl")


def rows_of(path: str, prompter, **flags) -> tuple[list, str]:
    said = []
    run = SimpleNamespace(cfg=sft.Config(data=path, **flags), say=said.append)
    return sft.file_rows(run, prompter, END), "\n".join(said)


def test_rows_of_a_file_and_how_many_are_too_long(prompter, tmp_path):
    path = write(tmp_path, *({"prompt": "1=", "completion": "x" * n} for n in range(1, 9)))
    rows, said = rows_of(path, prompter, max_length=6)
    assert [len(ids) for ids, _ in rows] == [4, 5, 6] and rows[0][1] == [0, 0, 1, 1]
    assert "8 examples, 5 longer than 6 tokens; 3 are learnt" in said
    with pytest.raises(sft.BadInput, match=f"{path}: nothing is left to learn of 8 examples, 8"):
        rows_of(path, prompter, max_length=3)


def test_a_row_that_learns_only_its_first_token_goes(prompter, tmp_path):
    """Nothing predicts that one."""
    lines = [{"prompt": prompt, "completion": "</think>c"} for prompt in ("", "1=")]
    rows, said = rows_of(write(tmp_path, *lines), prompter, loss_on="thought")
    assert [mask for _, mask in rows] == [[0, 0, 1, 0, 0]] and "1 are learnt" in said


def test_rows_of_a_file_begin_as_prompts_do(prompter, tmp_path, monkeypatch):
    """With BOS where the tokenizer puts one."""
    monkeypatch.setattr(prompter, "start", "<unk>")
    [(ids, mask)], _ = rows_of(write(tmp_path, {"prompt": "1=", "completion": "x"}), prompter)
    assert prompter.decode(ids) == "<unk>1=x<eos>" and mask == [0, 0, 0, 1, 1]


BAD = [
    ({"prompt": "a"}, "line 1", "all"),
    ([1], "item 1", "all"),
    ({"messages": [{"role": "user", "content": "a"}]}, "need --chat", "all"),
    ({"prompt": "a", "completion": "b"}, "line 1: --loss_on thought needs", "thought"),
]


@pytest.mark.parametrize("line, message, loss_on", BAD)
def test_bad_lines(prompter, tmp_path, line, message, loss_on):
    """Files that cannot be read: test_bad_input.py."""
    with pytest.raises(sft.BadInput, match=message):
        rows_of(write(tmp_path, line), prompter, loss_on=loss_on)


class Template:
    """A chat template with visible turns, each on a line of its own; it may forget the first."""

    forgets = False

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        kept = messages[self.forgets and len(messages) > 2 :]
        text = "".join(f"[{m['role']}]{m['content']}[end]\n" for m in kept)
        return text + "[assistant]" * add_generation_prompt


def test_chat_learns_every_assistant_turn_and_nothing_else():
    """The prompt of a reply is given, the reply and its end token are learnt, no newline behind."""
    roles = "system", "user", "assistant", "user", "assistant"
    chat = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    decode = {(7,): "[other]", (8,): "[end]"}
    prompter = SimpleNamespace(style="chat", chat=Template())
    prompter.decode = lambda ids: decode[tuple(ids)]
    parts = sft.chat_parts(prompter, chat, [7, 8])
    assert [text for text, learnt in parts if learnt] == ["assistant 2[end]", "assistant 4[end]"]
    whole = Template().apply_chat_template(chat, False, False)
    assert "".join(text for text, _ in parts) == whole.removesuffix("\n")
    prompter.chat.forgets = True
    with pytest.raises(sft.BadInput, match="rewrites earlier turns"):
        sft.chat_parts(prompter, chat, [7, 8])


def test_a_run_takes_every_line_in_a_new_order_each_epoch(run, cwd, small, monkeypatch):
    """And the learning rate of a step for all parameters, norms too."""
    seen, rates, add, update = [], [], sft.add_gradients, sft.update_model

    def noted(run, model, rows, num_tokens):
        seen.extend(len(ids) - 3 for ids, _ in rows)
        return add(run, model, rows, num_tokens)

    def updated(run, model, optimizer, parts, lr):
        metrics = update(run, model, optimizer, parts, lr)
        rates.append([group["lr"] for group in optimizer.param_groups])
        return metrics

    monkeypatch.setattr(sft, "add_gradients", noted)
    monkeypatch.setattr(sft, "update_model", updated)
    path = write(cwd, *({"prompt": "1=", "completion": "x" * n} for n in range(1, 6)))
    flags = f"--data {path} --steps 5 --batch_size 4 --eval_problems 0 --lr 0.01 --out a"
    assert run("sft", flags).code == 0
    epochs = [tuple(seen[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in epochs) and len(set(epochs)) > 1
    assert rates == [[pytest.approx(0.001 * step)] * 2 for step in range(1, 6)]


def test_the_next_traces_are_written_while_a_gpu_computes(run, cwd, monkeypatch):
    """Between the last backward pass and the first number that is read back."""
    order = []

    def follow(name):
        real = getattr(sft, name)

        def noted(*args, **options):
            order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(sft, name, noted)

    for name in ("add_gradients", "trace_example", "update_model"):
        follow(name)
    assert run("sft", "--steps 2 --batch_size 1 --eval_problems 0").code == 0
    assert order[2:] == ["add_gradients", "trace_example", "update_model"] * 2


def test_a_new_model_starts_from_scratch_and_is_resumed(run, cwd):
    flags = "--model scratch --num_layers 1 --hidden_size 32 --eval_problems 0"
    assert run("sft", f"{flags} --steps 1 --out a").code == 0
    assert run("sft", f"{flags} --steps 2 --out b").code == 0
    assert run("sft", "--resume a --steps 2", base=False).code == 0
    first, second = (sft.load_file(f"{x}/step-000002/model.safetensors") for x in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
