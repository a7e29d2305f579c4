"""sft.py's own functions: loss and schedule as the reference's, traces, masks, data files."""

import math
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import lines_of, vectors
from test_rewards import write

import rewards
import sft

VECTORS = vectors("sft_data")
END = [1]


@pytest.fixture(scope="module")
def prompter(small) -> "sft.Prompter":
    return sft.Prompter(sft.load_model(small), rewards.make_task("countdown"), chat=False)


@pytest.mark.parametrize("case", VECTORS["loss_normalisation"]["logits"], ids=lambda c: c["id"])
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


@pytest.mark.parametrize("case", VECTORS["lr_schedule"])
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
    assert prompter.decode(ids) == LEARNT["all"]
    assert prompter.decode([i for i, m in zip(ids, mask, strict=True) if m]) == LEARNT[loss_on]


def test_a_trace_depends_on_seed_and_number_and_survives_the_tokenizer(prompter):
    rows = set()
    for seed, index in [(1, 3), *((0, i) for i in range(30)), (0, 3)]:  # the last was there
        example = sft.trace_example(prompter, seed, index)
        ids, _ = sft.make_row(prompter, example, "completion", END)
        problem = prompter.task.problem("train", seed, index)
        stream = Random(f"trace {seed} {index}")  # a number has its trace, whatever came before
        assert example["completion"] == prompter.task.trace(problem, stream)
        given = prompter.encode(prompter.text(problem))
        assert ids[: len(given)] == given and ids[-1:] == END and 2 not in ids  # <unk>
        rows.add(prompter.decode(ids))
    assert len(rows) == 31
    assert all(prompter.decode(prompter.encode(chr(i))) == chr(i) for i in (10, *range(32, 127)))


def test_the_tiny_vocabulary_is_fixed(prompter, small):
    """Later scripts rely on these ids; what no trace uses is never sampled."""
    tags = "pad eos unk think /think answer /answer score bot eot latent".split()
    assert prompter.encode("".join(f"<{x}>" for x in tags) + "wait") == list(range(12))
    assert prompter.tokenizer.get_vocab_size() == 12 + 32 + 1 + 95 + 90
    assert len(prompter.encode("10+99=1234")) == 3 + 1 + 4  # 10 + 99 = and four digits
    never = set((sft.load_model(small).vocab_bias == -torch.inf).nonzero()[:, 0].tolist())
    assert never == {0, 2, 7, 8, 9, 10, *range(12, 44)}


def rows_of(path: str, prompter, **flags) -> tuple[list, str]:
    said = []
    run = SimpleNamespace(cfg=sft.Config(data=path, **flags), say=said.append)
    return sft.file_rows(run, prompter, END), "\n".join(said)


def test_rows_of_a_file_and_how_many_are_too_long(prompter, tmp_path, monkeypatch):
    lines = [{"prompt": "1=", "completion": "x" * n} for n in range(1, 9)]
    path = write(tmp_path / "a.jsonl", lines)
    rows, said = rows_of(path, prompter, max_length=6)
    assert [len(ids) for ids, _ in rows] == [4, 5, 6] and rows[0][1] == [0, 0, 1, 1]
    assert "8 examples, 5 longer than 6 tokens; 3 are learnt" in said
    with pytest.raises(sft.BadInput, match=f"{path}: nothing is left to learn of 8 examples, 8"):
        rows_of(path, prompter, max_length=3)
    # nothing predicts the first token: a row that learns only that one goes
    lines = [{"prompt": prompt, "completion": "</think>c"} for prompt in ("", "1=")]
    [(_, mask)], _ = rows_of(write(tmp_path / "b.jsonl", lines), prompter, loss_on="thought")
    assert mask == [0, 0, 1, 0, 0]
    monkeypatch.setattr(prompter, "start", "<unk>")  # as a BOS
    [(ids, mask)], _ = rows_of(write(tmp_path / "c.jsonl", lines[1:]), prompter)
    assert prompter.decode(ids) == "<unk>1=</think>c<eos>" and mask == [0, 0, 0, 1, 1, 1]


def test_bad_lines(prompter, tmp_path):
    chat, plain = {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"}
    bad = {"line 1": plain, "item 1": [1], "need --chat": chat}
    for message, line in (bad | {"--loss_on thought needs": plain | {"completion": "b"}}).items():
        with pytest.raises(sft.BadInput, match=message):
            path = write(tmp_path / "a.jsonl", [line])
            rows_of(path, prompter, loss_on="all" if line is chat else "thought")


def filled(messages, tokenize, add_generation_prompt):
    """A chat template with visible turns, each on a line of its own."""
    text = "".join(f"[{m['role']}]{m['content']}[end]\n" for m in messages)
    return text + "[assistant]" * add_generation_prompt


def test_chat_learns_every_assistant_turn_and_nothing_else():
    """The prompt of a reply is given, the reply and its end token are learnt, no newline behind."""
    roles = "system", "user", "assistant", "user", "assistant"
    chat = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    template = SimpleNamespace(apply_chat_template=filled)
    prompter = SimpleNamespace(style="chat", chat=template)
    prompter.decode = lambda ids: {7: "[other]", 8: "[end]"}[ids[0]]
    parts = sft.chat_parts(prompter, chat, [7, 8])
    assert [text for text, learnt in parts if learnt] == ["assistant 2[end]", "assistant 4[end]"]
    assert "".join(text for text, _ in parts) == filled(chat, False, False).removesuffix("\n")
    template.apply_chat_template = lambda turns, **how: filled(turns[len(turns) > 2 :], **how)
    with pytest.raises(sft.BadInput, match="rewrites earlier turns"):
        sft.chat_parts(prompter, chat, [7, 8])


def follow(monkeypatch, name, note):
    """note(arguments) before every call of sft.name."""
    real = getattr(sft, name)
    monkeypatch.setattr(sft, name, lambda *args: (note(args), real(*args))[1])


def test_a_run_takes_every_line_in_a_new_order_each_epoch(run, cwd, monkeypatch):
    """And the learning rate of a step for all parameters, norms too."""
    seen, rates = [], []
    follow(monkeypatch, "add_gradients", lambda a: seen.extend(len(ids) - 3 for ids, _ in a[2]))
    follow(monkeypatch, "update_model", lambda a: rates.extend(g["lr"] for g in a[2].param_groups))
    lines = [{"prompt": "1=", "completion": "x" * n} for n in range(1, 6)]
    path = write(cwd / "a.jsonl", lines)
    flags = f"--data {path} --steps 5 --batch_size 4 --eval_problems 0 --lr 0.01 --out a"
    assert run("sft", flags).code == 0
    entropies = [row["entropy"] for row in lines_of(cwd / "a" / "metrics.jsonl")]
    assert all(4 < nats < math.log(230) for nats in entropies)  # of a random model, a token
    epochs = [tuple(seen[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in epochs) and len(set(epochs)) > 1
    assert rates[2:] == pytest.approx([0.001 * step for step in range(1, 5) for _ in range(2)])


def test_the_next_traces_are_written_while_a_gpu_computes(run, monkeypatch):
    """Between the last backward pass and the first number that is read back."""
    order = []
    for name in ("add_gradients", "trace_example", "update_model"):
        follow(monkeypatch, name, lambda _, name=name: order.append(name))
    assert run("sft", "--steps 2 --batch_size 1 --eval_problems 0").code == 0
    assert order[2:] == ["add_gradients", "trace_example", "update_model"] * 2
