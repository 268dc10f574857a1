"""The pretended GPU is as strict as a real one; every test here would pass on a real one too."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from kernels.philox import uniform_pair

uniform_pair_triton = partial(uniform_pair, form="triton")
uniform_pair_reference = partial(uniform_pair, form="reference")

pytestmark = pytest.mark.slow


def test_tensors_say_where_they_are(gpu):
    there, here = torch.ones(2, device="cuda"), torch.ones(2)
    assert (
        there.is_cuda and not there.is_cpu and there.device == torch.device("cuda", 0)
    )
    assert here.is_cpu and not here.is_cuda
    for moved in (
        here.to("cuda"),
        here.to(there),
        there.double(),
        there[1:],
        there + 1,
        torch.zeros_like(there),
    ):
        assert moved.is_cuda
    for moved in (there.cpu(), there.to(here), there.to("cpu", torch.float64)):
        assert moved.is_cpu and moved.tolist() == [1, 1]
    assert there.to(torch.float32) is there and there.to("cuda", copy=True) is not there
    assert torch.tensor([3], device="cuda").is_cuda


def test_devices_do_not_mix(gpu):
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    for refused in (
        lambda: there + here,
        lambda: there @ here,
        lambda: torch.cat((there, here)),
        lambda: nn.functional.embedding(torch.tensor([0]), there),
        lambda: here[torch.tensor([0], device="cuda")],
        lambda: there.index_put_((torch.tensor([0], device="cuda"),), here[0]),
        lambda: there.numpy(),
        lambda: uniform_pair_triton(0, torch.arange(3), torch.arange(3, device="cuda")),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            refused()
    there[torch.tensor([1])] = torch.tensor(2.0)
    assert (there + torch.tensor(1.0)).tolist() == [[2, 2], [3, 3]]
    here.copy_(there)
    assert here.tolist() == [[1, 1], [2, 2]]


def test_modules_move_whole_and_have_gradients(gpu):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    module[1].weight = module[0].weight
    x = torch.randn(4, 3)
    module(x).square().sum().backward()
    expected = [parameter.grad for parameter in module.parameters()]
    there = copy.deepcopy(module).to("cuda")
    again = copy.deepcopy(there)
    for moved in (there, again):
        assert moved[1].weight is moved[0].weight and all(
            isinstance(p, nn.Parameter) for p in moved.parameters()
        )
        moved.zero_grad()
        moved(x.to("cuda")).square().sum().backward()
        for parameter, gradient in zip(moved.parameters(), expected, strict=True):
            assert parameter.is_cuda and parameter.grad.is_cuda
            assert torch.allclose(parameter.grad.cpu(), gradient, atol=1e-4)


def captured(function) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_a_graph_computes_when_it_is_replayed(gpu):
    x, y, kept = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), {}
    state = {"weight": x, "scale": 2}

    def step() -> None:
        between = state["weight"] * state["scale"] + 1
        y[1:].copy_(between[1:])
        x.add_(1)
        kept["between"] = between

    graph = captured(step)
    assert x.tolist() == [1, 1, 1] and y.tolist() == [0, 0, 0]
    graph.replay()
    assert (x.tolist(), y.tolist(), kept["between"].tolist()) == (
        [2, 2, 2],
        [0, 3, 3],
        [3, 3, 3],
    )
    x.fill_(10)  # the memory is what counts, and not what Python calls it now
    state.update(weight=torch.zeros(3, device="cuda"), scale=5)
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([11, 11, 11], [0, 21, 21])


def test_a_graph_launches_kernels_again(gpu):
    counter, out = torch.arange(4, device="cuda"), torch.zeros(4, 2, device="cuda")
    uniform_pair_triton(7, counter)  # compiles it
    graph = captured(lambda: out.copy_(uniform_pair_triton(7, counter)))
    assert out.sum() == 0
    counter += 5
    graph.replay()
    assert torch.equal(out.cpu(), uniform_pair_reference(7, counter.cpu()))


def test_a_graph_cannot_wait_for_the_host(gpu):
    x = torch.ones(3, device="cuda")
    for refused in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.cpu(),
    ):
        with pytest.raises(RuntimeError):
            captured(refused)
        if gpu:
            break  # a real GPU is left in a state in which it captures no more


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="what fresh memory holds on a real GPU is anything",
)
def test_fresh_memory_holds_nothing_of_use(gpu):
    x = torch.empty(3, device="cuda")
    assert x.isnan().all() and torch.empty_like(x, dtype=torch.int32).min() > 10**8


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is still there")
def test_afterwards_there_is_none():
    from pretended_gpu import pretended_gpu

    names = ("is_available", "graph", "CUDAGraph", "mem_get_info", "Stream")
    before = [getattr(torch.cuda, name) for name in names]
    with pretended_gpu():
        left = torch.ones(2, device="cuda")
    assert [getattr(torch.cuda, name) for name in names] == before
    with pytest.raises(AssertionError, match="outlived"):
        left + 1
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
