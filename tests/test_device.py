"""What only a GPU would show, on a machine without one.

A pretend device (torch's PrivateUse1 with a wrapper tensor) computes on the CPU, refuses to mix with CPU tensors,
counts what would make a GPU wait for the CPU, and records a step the way a CUDA graph does: what runs again is the
list of kernels on the same memory, not the Python code. So a state tensor that is replaced instead of written in
place, a number read back, or a tensor made on the wrong device is seen here.

Registering a device changes the whole process, therefore these tests run in a process of their own, which
test_pretend_device starts. They use private parts of torch and are skipped where those are missing.
"""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402

CAN_PRETEND = all(
    (
        hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        hasattr(backend_registration, "_DummyBackendModule"),
        hasattr(torch._C, "_set_only_lift_cpu_tensors"),
    )
)
needs_hook = pytest.mark.skipif(not CAN_PRETEND, reason=f"torch {torch.__version__} has no device backends in Python")
in_child = pytest.mark.skipif("PRETEND" not in os.environ, reason="runs in the process of test_pretend_device")
CPU = torch.device("cpu")
V = 23


@needs_hook
@pytest.mark.skipif("PRETEND" in os.environ, reason="is that process")
def test_pretend_device():
    """The tests marked in_child, in a process that has the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "on_device", __file__]
    done = subprocess.run(command, env=os.environ | {"PRETEND": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]


# ------------------------------------------------------------------------------------------------- capture, real


@pytest.fixture(autouse=True)
def nothing_noted():
    grpo.note_once.cache_clear()


def failing(message, where):
    """CUDAGraph and graph of torch.cuda that fail when made, entered or left."""

    def fail(*args):
        raise RuntimeError(message)

    class Graph:
        __init__ = fail if where == "made" else lambda self: None
        replay = fail

    class Capturing:
        def __init__(self, graph):
            pass

        __enter__ = fail if where == "entered" else lambda self: None
        __exit__ = fail if where == "left" else lambda self, *args: None

    return Graph, Capturing


@pytest.mark.parametrize("message", ["not permitted\nwhen stream is capturing", ""])
@pytest.mark.parametrize("where", ["made", "entered", "left", "in the step"])
def test_capture_that_fails_goes_on_eagerly(monkeypatch, capsys, where, message):
    calls = []

    def step():
        calls.append(1)
        if where == "in the step" and len(calls) == 1:
            raise RuntimeError(message)

    graph, capturing = failing(message, where)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    advance = grpo.capture(step, torch.device("cuda"))
    before = len(calls)
    advance()
    advance()
    assert len(calls) == before + 2  # the step itself
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    assert len(lines) == 1 and "eager" in lines[0] and message.split("\n")[0] in lines[0]


def test_capture_that_works_replays(monkeypatch, capsys):
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    _, capturing = failing("", "never")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    advance = grpo.capture(lambda: calls.append("step"), torch.device("cuda"))
    advance()
    advance()
    assert calls == ["step", "replay", "replay"] and capsys.readouterr().out == ""


def test_capture_elsewhere_is_the_step():
    calls = []

    def step():
        calls.append(1)

    assert grpo.capture(step, CPU) is step and grpo.capture(step, torch.device("mps")) is step and not calls


# ------------------------------------------------------------------------------------------------- the pretend device

WAITS = Counter()  # what made the device wait, by kind
RECORDING = []  # the graph being recorded, if one is


class Held(torch.Tensor):
    """A tensor of the pretend device; its numbers lie in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        kind = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("pretend", 0), **kind)

    def __init__(self, held):
        self.held = held

    def __repr__(self, **kwargs):
        return f"Held({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_kernel(func, args, kwargs or {})


class Graph:
    """A step recorded once: recording changes nothing, replay runs the same kernels on the same memory."""

    def __init__(self):
        self.kernels, self.memory = [], {}

    def keep(self, func, args):
        """Remember what the memory held that this kernel writes to."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.memory.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def replay(self):
        for func, args, kwargs, old in self.kernels:
            for there, again in zip(old, tensors_in(func(*args, **kwargs)), strict=True):
                assert there.shape == again.shape
                if there.data_ptr() != again.data_ptr():
                    there.copy_(again)


@contextmanager
def recorded(graph):
    RECORDING.append(graph)
    try:
        yield
    finally:
        RECORDING.pop()
        for storage, before in graph.memory.values():
            storage.copy_(before)


def waits(func, args, target):
    """Which kind of waiting for the device this operation is, or None."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return "item"
    if func in (aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default):
        return "nonzero"
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        return "mask" if any(x is not None and x.dtype == torch.bool for x in args[1]) else None
    if target == "cpu" or (func is aten.copy_.default and not isinstance(args[0], Held)):
        return "cpu"
    return None


def change(value, function):
    """The function applied to what stands in nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)([change(x, function) for x in value])
    if isinstance(value, dict):
        return {name: change(x, function) for name, x in value.items()}
    return function(value)


def tensors_in(value):
    found = []
    change(value, lambda x: found.append(x) if isinstance(x, torch.Tensor) else None)
    return found


@functools.cache
def has_parts(func):
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def run_kernel(func, args, kwargs):
    """One operation: on the CPU for what the tensors hold, if one of them is on the device or is to be made there."""
    wrappers, plain, devices = {}, [], []

    def unwrap(x):
        if isinstance(x, Held):
            wrappers[id(x.held)] = x
            return x.held
        if isinstance(x, torch.Tensor):
            plain.append(x)
        if isinstance(x, torch.device):
            devices.append(x.type)
            return CPU
        return x

    held_args, held_kwargs = change(args, unwrap), change(kwargs, unwrap)
    target = devices[0] if devices else None
    if not wrappers and target != "pretend":
        return func(*args, **kwargs)
    if has_parts(func):
        with Pretend():  # inference mode hands over whole functions; their parts count
            return func.decompose(*args, **kwargs)
    moves = func is torch.ops.aten.copy_.default or target is not None
    if wrappers and not moves and any(x.dim() for x in plain):
        raise RuntimeError(f"{func}: tensors on the pretend device and on the CPU")
    kind = waits(func, args, target)
    if RECORDING and (kind or plain and moves):
        raise RuntimeError(f"{func} is not permitted while a graph is recorded")
    WAITS[kind] += 1
    if RECORDING:
        RECORDING[-1].keep(func, held_args)
    out = func(*held_args, **held_kwargs)
    if RECORDING:
        RECORDING[-1].kernels.append((func, held_args, held_kwargs, tensors_in(out)))
    if kind == "cpu":
        return out.clone() if target == "cpu" and id(out) in wrappers else out
    for x in tensors_in(out):
        if id(x) not in wrappers:  # else written in place
            wrappers[id(x)] = Held(x)
    return change(out, lambda x: wrappers.get(id(x), x))


class Pretend(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments: torch.zeros(3, device="pretend")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_kernel(func, args, kwargs or {})


class Lists(TorchFunctionMode):
    """torch refuses tolist of wrapper tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and isinstance(args[0], Held):
            return args[0].cpu().tolist()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def registered():
    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):  # torch.utils.checkpoint asks
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=Backend())


@pytest.fixture
def device(registered):
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) shows its copy to the device
    with Pretend(), Lists():
        WAITS.clear()
        yield torch.device("pretend", 0)
    torch._C._set_only_lift_cpu_tensors(False)


@in_child
def test_on_device_tensors_do_not_mix(device):
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=device)
    assert there.device == device and (there + 1).device == device and isinstance(there.t(), Held)
    for mixed in (
        lambda: here + there,
        lambda: there @ here,
        lambda: there.copy_(here).add_(here),
        lambda: torch.cat([here, there]),
        lambda: there[torch.tensor([0, 1])],
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
        lambda: there.masked_fill_(here > 0, 0.0),
    ):
        with pytest.raises(RuntimeError, match="on the CPU"):
            mixed()
    assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 3  # a number is no mixture
    model = make_model()
    with pytest.raises(RuntimeError, match="on the CPU"):
        model(torch.tensor([[1, 2]], device=device))


@in_child
def test_on_device_waiting_is_counted(device):
    x = torch.arange(6.0, device=device)
    for kind, wait in {
        "item": (lambda: x[2].item(), lambda: int(x[2]), lambda: bool(x[2] > 1), lambda: float(x.sum())),
        "cpu": (lambda: x.cpu(), lambda: x.tolist(), lambda: x.to("cpu"), lambda: torch.zeros(6).copy_(x)),
        "nonzero": (lambda: x.nonzero(), lambda: x.masked_select(x > 1), lambda: torch.where(x > 1)),
        "mask": (lambda: x[x > 1], lambda: x.clone().__setitem__(x > 1, x[:4])),
    }.items():
        for function in wait:
            for mode in (torch.no_grad, torch.inference_mode):
                WAITS.clear()
                with mode():
                    function()
                assert WAITS[kind] == 1 and set(WAITS) <= {kind, None}, kind
    WAITS.clear()
    x[torch.tensor([1, 2], device=device)] += x.clamp(min=1)[:2].to(torch.float64).to(x.dtype)
    assert set(WAITS) == {None}


@in_child
def test_on_device_graph_replays_kernels(device):
    """The recorder itself: writes in place are seen, new tensors are not, reading back is refused."""
    box = {"x": torch.zeros(2, device=device), "count": 0}

    def good():
        box["count"] += 1
        box["x"] += (box["x"] * 2).sum() + 1

    def bad():
        box["x"] = box["x"] + 1

    graph = Graph()
    with recorded(graph):
        good()
    assert box["x"].tolist() == [0.0, 0.0]  # recorded, not run
    graph.replay()
    graph.replay()
    assert box["x"].tolist() == [6.0, 6.0] and box["count"] == 1
    graph = Graph()
    with recorded(graph):
        bad()
    graph.replay()
    graph.replay()
    assert box["x"].tolist() == [7.0, 7.0]  # the second replay starts from the old memory again
    with pytest.raises(RuntimeError, match="not permitted"), recorded(Graph()):
        box["x"].sum().item()


# ------------------------------------------------------------------------------------------------- loading and saving


def make_model(eos=(), banned=(), dtype=torch.float64):
    config = {"model_type": "qwen3", "vocab_size": V, "hidden_size": 24, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 100.0, "tie_word_embeddings": False, "head_dim": 8, "hidden_act": "silu"}
    model, generator = grpo.Model(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    model.eos_ids = list(eos)
    if banned:
        model.vocab_bias = torch.zeros(V).index_fill(0, torch.tensor(list(banned)), -torch.inf)
    return model.to(dtype)


def moved(model, device):
    """A copy on the device (its parameters replaced: a wrapper cannot be changed under a parameter's feet)."""
    with torch.device("meta"):
        copy = grpo.Model(model.config)
    copy.load_state_dict({name: t.detach().to(device) for name, t in model.state_dict().items()}, assign=True)
    copy.eos_ids = model.eos_ids
    copy.vocab_bias = None if model.vocab_bias is None else model.vocab_bias.to(device)
    return copy


def numbers(rows, steps):
    keys = product(range(rows // 4), range(4))
    return torch.from_numpy(np.stack([grpo.row_uniforms(1, 0, prompt, sample, steps) for prompt, sample in keys]))


PROMPTS = [[4, 5, 6, 7, 8], [1], [9, 2, 3]]


@in_child
@pytest.mark.parametrize("tied", [False, True])
def test_on_device_load_and_save(device, tied, tmp_path):
    model = make_model(dtype=torch.float32)
    model.config |= {"tie_word_embeddings": tied}
    model.folder = tmp_path
    grpo.save_model(model, tmp_path / "a")
    generation = {"eos_token_id": [3, 7], "suppress_tokens": [0, 22]}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(generation))
    there = grpo.load_model(tmp_path / "a", device)
    here = grpo.load_model(tmp_path / "a")
    assert all(t.device == device for t in (*there.parameters(), *there.buffers()))
    assert (there.lm_head.weight is there.model["embed_tokens"].weight) == tied
    assert sum(1 for _ in there.buffers()) == 1 and there.vocab_bias.tolist() == here.vocab_bias.tolist()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(there.logits(there(tokens.to(device))).cpu(), here.logits(here(tokens)))
    grpo.save_model(there, tmp_path / "b")
    again = grpo.load_model(tmp_path / "b")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in here.state_dict().items())


# ------------------------------------------------------------------------------------------------- sampling

OPTIONS = {
    "plain": {},
    "cool-top-p": {"temperature": 0.7, "top_p": 0.8},
    "top-k": {"top_k": 5},
    "greedy": {"temperature": 0.0},
    "min-tokens": {"min_tokens": 12},
}


def same(there, here):
    """Two results agree in what they mean, and the first lies on the CPU."""
    assert all(t.device == CPU for t in (there.tokens, there.lengths, there.finished, there.logprobs))
    assert there.lengths.tolist() == here.lengths.tolist() and there.finished.tolist() == here.finished.tolist()
    for row, length in enumerate(here.lengths):
        assert there.tokens[row, :length].tolist() == here.tokens[row, :length].tolist()
        torch.testing.assert_close(there.logprobs[row, :length], here.logprobs[row, :length])
    return True


@in_child
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_device_sampling_equals_the_cpu(device, options):
    """Fixed shapes here, rows that leave there: the same completions."""
    model, uniforms = make_model(eos=(3, 7), banned=(0, 22)), numbers(12, 26)
    here = grpo.generate(model, PROMPTS, uniforms, **options)
    assert len(set(here.lengths.tolist())) > 1
    assert same(grpo.generate(moved(model, device), PROMPTS, uniforms, **options), here)


@in_child
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_device_sampling_does_not_wait(device, options):
    """No waiting per token: one look at the stop flags per 8 tokens, and the results fetched once."""
    model, seen = moved(make_model(banned=(0, 22)), device), []
    for steps in (16, 32):
        uniforms = numbers(12, steps)
        WAITS.clear()
        grpo.generate(model, PROMPTS, uniforms, **options)
        assert WAITS["item"] <= steps // 8 + 1
        assert WAITS["nonzero"] == WAITS["mask"] == 0
        seen.append(WAITS["cpu"])
    assert seen[0] == seen[1] <= 6


@in_child
def test_on_device_sampling_ends_when_all_rows_have(device):
    model, steps = make_model(eos=tuple(range(0, V, 2))), 200
    uniforms, calls = numbers(12, steps), []
    here = grpo.generate(model, PROMPTS, uniforms)
    there = moved(model, device)
    there.register_forward_pre_hook(lambda module, inputs: calls.append(tuple(inputs[0].shape)))
    assert same(grpo.generate(there, PROMPTS, uniforms), here)
    longest = int(here.lengths.max())
    assert longest < 30 and len(calls) <= -(-longest // 8) * 8
    assert calls[0] == (3, 5) and set(calls[1:]) == {(12, 1)}  # fixed shapes


@in_child
def test_on_device_stop_strings(device):
    tokenizer = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(V)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    model, uniforms = make_model(), numbers(12, 28)
    tokens = grpo.generate(model, PROMPTS, uniforms).tokens.tolist()
    free = ["".join(chr(97 + token) for token in row) for row in tokens]
    options = {"stop": (free[0][9:11], free[5][20:22], free[7][3:5]), "tokenizer": tokenizer}
    here = grpo.generate(model, PROMPTS, uniforms, **options)
    ends = [min([text.find(s) + len(s) for s in options["stop"] if s in text] or [28]) for text in free]
    assert here.lengths.tolist() == ends and len(set(ends)) > 3
    WAITS.clear()
    assert same(grpo.generate(moved(model, device), PROMPTS, uniforms, **options), here)
    assert WAITS["item"] + WAITS["nonzero"] + WAITS["mask"] + WAITS["cpu"] <= 16 * 6 + 30  # at looks, per live row


@in_child
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_device_graph(device, options, monkeypatch):
    """Recorded once and replayed as kernels, the loop gives what the CPU gives."""
    model, uniforms, graphs, calls = make_model(eos=(3, 7), banned=(0, 22)), numbers(12, 26), [], []
    here = grpo.generate(model, PROMPTS, uniforms, **options)

    def capture(step, where):
        assert where == device
        graphs.append(Graph())
        with recorded(graphs[-1]):
            step()
        return graphs[-1].replay

    monkeypatch.setattr(grpo, "capture", capture)
    there = moved(model, device)
    there.register_forward_pre_hook(lambda module, inputs: calls.append(tuple(inputs[0].shape)))
    assert same(grpo.generate(there, PROMPTS, uniforms, **options), here)
    assert len(graphs) == 1 and calls == [(3, 5), (12, 1), (12, 1)]  # prompts, the warm step, the recorded one


@in_child
@pytest.mark.parametrize("where", ["made", "entered"])
def test_on_device_graph_that_fails(device, where, monkeypatch, capsys):
    """The same tokens, and one line that says so, the first time."""
    model, uniforms = make_model(eos=(3, 7)), numbers(12, 26)
    here, there, capture = grpo.generate(model, PROMPTS, uniforms), moved(model, device), grpo.capture
    graph, capturing = failing("capture is not supported", where)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(grpo, "capture", lambda step, _: capture(step, torch.device("cuda")))
    for lines in (1, 0):
        assert same(grpo.generate(there, PROMPTS, uniforms), here)
        assert len(capsys.readouterr().out.splitlines()) == lines


# ------------------------------------------------------------------------------------------------- training


def training_step(model, where, length, chunk=2**26):
    """Loss, gradients and what the device waited for, of one batch made from lists as training makes it."""
    generator = torch.Generator().manual_seed(length)
    rows = [torch.randint(1, V, (length - i,), generator=generator).tolist() for i in range(4)]
    masks = [[False] * 3 + [True] * (len(row) - 3) for row in rows]
    tokens, mask = grpo.pad_rows(rows, where, torch.long), grpo.pad_rows(masks, where, torch.bool)
    WAITS.clear()
    logprobs, entropy = grpo.completion_logprobs(model, tokens, mask, 0.9, chunk)
    loss = -(logprobs * mask[:, 1:]).sum() / (4 * length)
    loss.backward()
    waited = {kind: WAITS[kind] for kind in ("item", "cpu", "nonzero", "mask")}
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}, waited


@in_child
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [2**26, 7 * V])
def test_on_device_training_step(device, chunk, checkpointing, tmp_path):
    here = make_model(banned=(0,))
    there = moved(here, device)
    here.checkpointing = there.checkpointing = checkpointing
    (loss, gradients, _), (our_loss, ours, _) = (
        training_step(model, where, 12, chunk) for model, where in ((here, CPU), (there, device))
    )
    assert abs(loss - our_loss) < 1e-10
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-10, rtol=0, msg=name)
    optimizer = torch.optim.AdamW(there.parameters(), lr=1e-2)
    before = there.lm_head.weight.detach().clone()
    optimizer.step()
    assert all(p.device == device for p in there.parameters())
    assert 0.005 < (there.lm_head.weight - before).abs().max().item() < 0.02
    assert training_step(there, device, 12, chunk)[0] != loss
    there.folder = tmp_path
    grpo.save_model(there, tmp_path / "saved")
    again = grpo.load_model(tmp_path / "saved").double()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), there(tokens.to(device)).cpu(), atol=1e-5, rtol=0)


@in_child
def test_on_device_training_does_not_wait_per_token(device):
    """The mask picks the trained positions: a fixed number of waits per micro-batch."""
    there = moved(make_model(), device)
    short, long = (training_step(there, device, length)[2] for length in (8, 40))
    assert short == long and sum(long.values()) <= 6
    chunked = training_step(there, device, 40, 9 * V)[2]
    assert chunked == long  # and none per chunk
