"""What only a GPU would show, on a machine without one.

A pretend device (torch's PrivateUse1 with a wrapper tensor) computes on the CPU, refuses to mix
with CPU tensors, counts what would make a GPU wait, and records a step the way a CUDA graph does:
what runs again is the list of kernels on the same memory, not the Python code. So a state tensor
that is replaced instead of written in place, or a number read back, is seen here.

A device changes the whole process, so test_pretend_device starts one for these tests. They use
private parts of torch and are skipped where those are missing.
"""

import functools
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from test_sampler import V, ended, make_model, numbers, pairs, shapes_of, stopper
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import grpo

PARTS = "_setup_privateuseone_for_python_backend", "_DummyBackendModule"
CAN_PRETEND = all(hasattr(backend_registration, name) for name in PARTS)
IN_CHILD = "PRETEND" in os.environ
in_child = pytest.mark.skipif(not IN_CHILD, reason="runs in the process of test_pretend_device")
CPU = torch.device("cpu")


@pytest.mark.skipif(not CAN_PRETEND, reason="torch without device backends in Python")
@pytest.mark.skipif(IN_CHILD, reason="is that process")
def test_pretend_device():
    """The tests marked in_child, in a process that has the device."""
    options = "-q -x -p no:cacheprovider -k on_device".split()
    command = [sys.executable, "-m", "pytest", *options, __file__]
    env = os.environ | {"PRETEND": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]


WAITS = Counter()  # what made the device wait, by kind
RECORDING = []  # the graph being recorded, if one is


class Held(torch.Tensor):
    """A tensor of the pretend device; its numbers lie in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        place |= {"dtype": held.dtype, "device": torch.device("pretend", 0)}
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, **place)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_kernel(func, args, kwargs or {})


class Graph:
    """A step recorded, not run; replay runs the same kernels on the same memory."""

    def __init__(self):
        self.kernels, self.memory = [], {}

    def keep(self, func, args):
        """Remember what the memory held that this kernel writes to."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            alias = argument.alias_info
            if alias is not None and alias.is_write and isinstance(value, torch.Tensor):
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
    if func.overloadpacket in (aten.nonzero, aten.masked_select, aten.equal, aten._unique2):
        return "nonzero"
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
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
    """One operation, on the CPU, if a tensor is on the device or is to be made there."""
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
    """Sees what has no tensor of the device among its arguments: torch.zeros(3, device=...)."""

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

    setup = backend_registration._setup_privateuseone_for_python_backend
    setup("pretend", backend_module=Backend())


@pytest.fixture
def device(registered):
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) shows its copy
    with Pretend(), Lists():
        WAITS.clear()
        yield torch.device("pretend", 0)
    torch._C._set_only_lift_cpu_tensors(False)


@in_child
def test_on_device_pretence(device):
    """No mixture, each wait counted, kernels recorded and replayed on the same memory."""
    x, box, graph = torch.arange(6.0, device=device), torch.zeros(2, device=device), Graph()
    with pytest.raises(RuntimeError, match="on the CPU"):
        x + torch.ones(6)
    kinds = {"item": x[2].item, "cpu": x.tolist, "nonzero": x.nonzero, "mask": lambda: x[x > 1]}
    for (kind, function), inference in product(kinds.items(), (False, True)):
        WAITS.clear()
        with torch.inference_mode(inference):
            function()
        assert WAITS[kind] == 1 and set(WAITS) <= {kind, None}, kind
    with recorded(graph):
        box += (box * 2).sum() + 1
        with pytest.raises(RuntimeError, match="not permitted"):
            box.sum().item()
    assert box.tolist() == [0.0, 0.0]  # recorded, not run
    graph.replay()
    graph.replay()
    assert box.tolist() == [6.0, 6.0]


PROMPTS = [[4, 5, 6, 7, 8], [1], [9, 2, 3]]


def make(dtype=torch.float64, **options):
    return make_model(model_type="qwen3", num_hidden_layers=1, **options).to(dtype)


def moved(model, device):
    """A copy on the device (a wrapper cannot be changed under a parameter's feet)."""
    with torch.device("meta"):
        copy = grpo.Model(model.config)
    held = {name: tensor.detach().to(device) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(held, assign=True)
    copy.eos_ids = model.eos_ids
    copy.vocab_bias = None if model.vocab_bias is None else model.vocab_bias.to(device)
    return copy


def same(there, here):
    """Two results agree in what they mean, wherever they lie."""
    for name in ("tokens", "lengths", "finished", "logprobs"):
        setattr(there, name, getattr(there, name).cpu())
    assert [ended(there, row) for row in range(12)] == [ended(here, row) for row in range(12)]
    for row, length in enumerate(here.lengths):
        torch.testing.assert_close(there.logprobs[row, :length], here.logprobs[row, :length])
    return True


def pretend_graphs(monkeypatch):
    """The device calls itself CUDA, whose graphs are recorded here; a list of them."""
    graphs = []

    class Noted(Graph):
        def __init__(self):
            super().__init__()
            graphs.append(self)

    monkeypatch.setattr(Held, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Noted)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    return graphs


@in_child
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_on_device_sampling_equals_the_cpu(device, temperature, graph, monkeypatch):
    """Rows leave there, fixed shapes here, eager or recorded once and replayed as kernels."""
    model = make(eos=(3, 7), banned=(0, 22))
    there = moved(model, device)
    shapes = shapes_of(there)
    for steps in (26, 12, 3, 2):  # each batch has its own graph, one of few tokens needs none
        uniforms = numbers(pairs(3, 4), steps)
        here = grpo.generate(model, PROMPTS, uniforms, temperature)
        with monkeypatch.context() as patch:
            graphs = pretend_graphs(patch) if graph else []
            shapes.clear()
            assert same(grpo.generate(there, PROMPTS, uniforms, temperature), here)
        assert len(graphs) == (graph and steps > 2)
        assert shapes[0] == (3, 5) and set(shapes[1:]) == {(12, 1)}
        assert len(shapes) <= 3 or not graph  # prompts, a warm-up, the recorded one


@in_child
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_on_device_sampling_does_not_wait(device, temperature):
    """No waiting per token: one look at the flags per 8 tokens, at most four results fetched."""
    model = moved(make(banned=(0, 22)), device)
    for steps in (16, 32):
        uniforms = numbers(pairs(3, 4), steps)
        WAITS.clear()
        grpo.generate(model, PROMPTS, uniforms, temperature)
        assert WAITS["nonzero"] <= steps // 8 and WAITS["item"] == WAITS["mask"] == 0
        assert WAITS["cpu"] <= 4
    shapes = shapes_of(model)
    model.eos_ids = list(range(0, V, 2))
    s = grpo.generate(model, PROMPTS, numbers(pairs(3, 4), 200), temperature)
    assert len(shapes) <= -(-int(s.lengths.max()) // 8) * 8 < 200  # ends when all rows have


@in_child
@pytest.mark.parametrize("graph", [False, True])
def test_on_device_stop_strings(device, graph, monkeypatch):
    model, uniforms = make(), numbers(pairs(3, 4), 28)
    letters = [chr(97 + i) for i in range(V)]
    tokens = grpo.generate(model, PROMPTS, uniforms).tokens.tolist()
    free = ["".join(letters[token] for token in row) for row in tokens]
    stop = stopper((free[0][9:11], free[5][20:22], free[7][3:5]), [*letters, "."])
    here = grpo.generate(model, PROMPTS, uniforms, stop=stop)
    assert len(set(here.lengths.tolist())) > 3
    if graph:
        pretend_graphs(monkeypatch)
    there = moved(model, device)
    WAITS.clear()
    assert same(grpo.generate(there, PROMPTS, uniforms, stop=stop), here)
    # four looks, the last at the end; each reads flags, tokens and lengths once
    assert WAITS["nonzero"] + WAITS["cpu"] <= 3 * 4 + 4
    assert not WAITS["mask"] and WAITS["item"] <= 1


def step_logprobs(model, where, length):
    """Log-probabilities of a batch that is made from lists as in training."""
    generator = torch.Generator().manual_seed(length)
    rows = [torch.randint(1, V, (length - i,), generator=generator).tolist() for i in range(4)]
    masks = [[False] * 3 + [True] * (len(row) - 3) for row in rows]
    tokens, mask = grpo.pad_rows(rows, where, torch.long), grpo.pad_rows(masks, where, torch.bool)
    WAITS.clear()
    return grpo.completion_logprobs(model, tokens, mask, 0.9)[0]


def training_step(model, where, length, positions=2**20):
    """Sum of the log-probabilities, gradients, what the device waited for."""
    model.config["vocab_size"] = 2**23 // positions  # at a time through the head
    total = step_logprobs(model, where, length).sum()
    total.backward()
    waited = sum(WAITS[kind] for kind in ("item", "cpu", "nonzero", "mask"))
    return total.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}, waited


@in_child
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("positions", [2**20, 7])
def test_on_device_training_step(device, positions, checkpointing):
    here = make(banned=(0,)).requires_grad_()
    there = moved(here, device)
    here.checkpointing = there.checkpointing = checkpointing
    loss, gradients, _ = training_step(here, CPU, 12, positions)
    our_loss, ours, _ = training_step(there, device, 12, positions)
    assert abs(loss - our_loss) < 1e-10
    torch.testing.assert_close(ours, gradients, atol=1e-10, rtol=0)


@in_child
def test_on_device_training_does_not_wait_per_token(device):
    """The mask picks the trained positions: so many waits per micro-batch, and none per chunk."""
    there = moved(make(), device)
    for length, positions in ((8, 2**20), (40, 2**20), (40, 9)):
        assert training_step(there, device, length, positions)[2] <= 6


@in_child
def test_on_device_head_is_compiled_and_bounded_by_the_card(device, monkeypatch):
    """On CUDA alone; at 16 bytes a logit a tenth of the card's memory."""
    compiled, there = [], moved(make(), device)
    expected = training_step(there, device, 12)[0]

    def compile(function, dynamic):
        def fused(model, hidden, *args):
            compiled.append(len(hidden))
            return function(model, hidden, *args)

        return fused if dynamic else None

    there.config["vocab_size"] = V
    monkeypatch.setattr(Held, "is_cuda", True)
    monkeypatch.setattr(torch, "compile", compile)
    for positions, calls in ((1000, 1), (7, 2 * 5)):  # of 30; again going backward
        card = 160 * V * positions
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card=card: (0, card))
        compiled.clear()
        total = step_logprobs(there, device, 12).sum()
        total.backward()
        assert abs(total.item() - expected) < 1e-10
        assert len(compiled) == calls and max(compiled) <= positions


@in_child
def test_on_device_rows_fit_what_is_free(device, monkeypatch):
    """Half of the free memory, after what training kept is given back."""
    there, given = moved(make(torch.float32), device), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2_000_000 * len(given), 9e9))
    c = there.config
    row = 2 * 4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 100
    assert grpo.rows_at_once(there, 100) == min(256, 10**9 // row)  # as on a CPU
    monkeypatch.setattr(Held, "is_cuda", True)
    assert grpo.rows_at_once(there, 100) == 1_000_000 // row
