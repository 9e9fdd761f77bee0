"""Operators: the CPU's results, forward and backward; a real device's refusals; optimizers and transforms on top."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Op = Callable[..., torch.Tensor]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


OPS: dict[str, tuple[Op, tuple[torch.Tensor, ...]]] = {
    "linear": (F.linear, (randn(4, 8), randn(3, 8), randn(3))),
    "conv1d": (F.conv1d, (randn(2, 3, 9), randn(4, 3, 3), randn(4))),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2), (randn(2, 4, 8, 8), randn(6, 2, 3, 3))),
    "conv_transpose2d": (F.conv_transpose2d, (randn(2, 4, 5, 5), randn(4, 3, 3, 3), randn(3))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), (randn(4, 8), randn(8), randn(8))),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (randn(4, 3, 2, 2),)),
    "group_norm": (lambda x: F.group_norm(x, 2), (randn(2, 4, 3, 3),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w), (randn(4, 8), randn(8))),
    "embedding": (F.embedding, (ints(10, 4, 5), randn(10, 3))),
    "embedding_bag": (lambda i, w: F.embedding_bag(i, w, mode="sum"), (ints(10, 4, 5), randn(10, 3))),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (randn(1, 2, 6, 4),) * 3),
    "softmax": (lambda x: x.softmax(-1), (randn(4, 8),)),
    "cross_entropy": (F.cross_entropy, (randn(6, 10), ints(10, 6))),
    "cumsum": (lambda x: x.cumsum(0), (randn(4, 8),)),
    "index": (lambda x, i: x[i, 1:] * 2, (randn(10, 4), ints(10, 6))),
    "mask": (lambda x: x[x > 0].exp(), (randn(4, 8),)),
    "index_put": (lambda x, i, v: x.clone().index_put_((i,), v, True), (randn(5, 3), ints(5, 7), randn(7, 3))),
    "scatter": (lambda x, i: torch.zeros_like(x).scatter_add(1, i, x), (randn(4, 8), ints(8, 4, 8))),
    "gather": (lambda x, i: x.gather(1, i), (randn(4, 8), ints(8, 4, 3))),
    "sort": (lambda x: x.sort(-1).values, (randn(4, 8),)),
    "topk": (lambda x: x.topk(3).values, (randn(4, 8),)),
    "nonzero": (lambda x: x.relu().nonzero(), (randn(4, 8),)),
    "unique": (lambda x: x.unique(), (ints(5, 20),)),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (randn(2, 3, 4), randn(2, 5, 4))),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (randn(1, 2, 4, 4),)),
    "max_pool": (lambda x: F.max_pool2d(x, 2), (randn(1, 2, 6, 6),)),
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), (randn(4, 8),)),
    "svd": (lambda x: torch.linalg.svdvals(x), (randn(4, 8),)),
    "where": (lambda x: torch.where(x > 0, x, torch.tensor(0.5)), (randn(4, 8),)),
    "sgn": (lambda x: x.sgn() * x, (randn(4, 8),)),
    "tensor_split": (lambda x: torch.cat([t.sin() for t in x.tensor_split(3)]), (randn(7, 2),)),
    "take_along_dim": (lambda x, i: x.take_along_dim(i, 1), (randn(4, 8), ints(8, 4, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_results_and_gradients_are_the_cpus(musa: str, name: str) -> None:
    op, inputs = OPS[name]
    here = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    there = [x.to(musa).requires_grad_(x.is_floating_point()) for x in inputs]
    want, got = op(*here), op(*there)
    assert got.device.type == musa
    assert got.stride() == want.stride()
    torch.testing.assert_close(got.cpu(), want)
    if want.requires_grad:
        want.square().sum().backward()
        got.square().sum().backward()
        for x, y in zip(here, there, strict=True):
            if x.grad is not None:
                assert y.grad is not None
                assert y.grad.device.type == musa
                torch.testing.assert_close(y.grad.cpu(), x.grad)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layers(musa: str, kind: type[torch.nn.RNNBase], bias: bool) -> None:
    torch.manual_seed(0)
    here = kind(4, 3, num_layers=2, bias=bias, bidirectional=True)
    there = copy.deepcopy(here).to(musa)
    x = randn(5, 2, 4)
    want, got = here(x), there(x.to(musa))
    torch.testing.assert_close(got[0].cpu(), want[0])
    (want[0].square().sum() + want[1][0].sum()).backward()
    (got[0].square().sum() + got[1][0].sum()).backward()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad)


def test_mixed_devices_are_refused(musa: str) -> None:
    host, device = torch.ones(2, 3), torch.ones(2, 3, device=musa)
    refused: list[Callable[[], object]] = [
        lambda: device + host,
        lambda: host @ device.t(),
        lambda: torch.cat([device, host]),
        lambda: F.linear(device, host),
        lambda: torch.add(device, device, out=host),
        lambda: host.add_(device),
        lambda: torch.ones(()).add_(device[0, 0]),
        lambda: F.embedding(torch.tensor([0]), device),
        lambda: torch.where(host > 0, device, 0.0),
    ]
    for call in refused:
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            call()


def test_mixed_devices_that_real_devices_take(musa: str) -> None:
    device = torch.arange(6.0, device=musa).view(2, 3)
    assert (device + torch.tensor(1.0)).sum().item() == 21
    assert (torch.tensor(2.0) * device).device.type == musa
    assert device[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert device[torch.tensor([False, True])].tolist() == [[3, 4, 5]]
    device[torch.tensor([0])] = 7.0
    assert device[0].tolist() == [7, 7, 7]
    device.masked_fill_(device == 7, torch.tensor(1.0))
    assert device.copy_(torch.zeros(3)).sum().item() == 0


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_optimizers_step_as_on_the_cpu(musa: str, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    here = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4)
    )
    there = copy.deepcopy(here).to(musa)
    x = randn(6, 8)
    for net, batch in ((here, x), (there, x.to(musa))):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(b.cpu(), a, msg=name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_transforms(musa: str) -> None:
    x = randn(3).to(musa)
    assert torch.func.vmap(torch.sin)(x).device.type == musa
    torch.testing.assert_close(torch.func.jacrev(torch.sin)(x), torch.diag(x.cos()))
    torch.testing.assert_close(torch.func.jvp(torch.sin, (x,), (x,))[1], x.cos() * x)
    double = torch.rand(3, dtype=torch.float64, device=musa, requires_grad=True)
    assert torch.autograd.gradcheck(torch.sin, double)
    assert torch.autograd.gradgradcheck(torch.sin, double)


def test_checkpointing_repeats_the_dropout(musa: str) -> None:
    x = torch.ones(100, device=musa, requires_grad=True)
    y = checkpoint(F.dropout, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_default_device_and_inference_mode(musa: str) -> None:
    with torch.device(musa):
        assert torch.ones(2).add(torch.rand(2)).device.type == musa
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.device.type == musa
    with torch.inference_mode():
        y = layer(torch.ones(1, 2, device=musa))
        view = layer.weight.t()
    assert y.is_inference()
    assert not view.is_inference()


def test_batch_norm_updates_its_statistics(musa: str) -> None:
    here, there = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3).to(musa)
    x = randn(4, 3, 2, 2)
    here(x)
    there(x.to(musa))
    torch.testing.assert_close(there.running_mean.cpu(), here.running_mean)


def test_an_operator_with_a_cpu_kernel_alone_runs_here_too(musa: str) -> None:
    with torch.library._scoped_library("simulator_test", "DEF") as library:
        library.define("twice(Tensor x, Tensor(a!) seen) -> Tensor")
        library.impl("twice", lambda x, seen: (seen.add_(1), x * 2)[1], "CPU")
        x, seen = torch.ones(3, device=musa), torch.zeros((), device=musa)
        assert torch.ops.simulator_test.twice(x, seen).tolist() == [2, 2, 2]
        assert seen.item() == 1


def test_only_indices_may_stay_on_the_cpu(musa: str) -> None:
    device, index = torch.zeros(3, device=musa), torch.tensor([0, 1])
    device[index] = torch.ones(2, device=musa)
    assert device.tolist() == [1, 1, 0]
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        device[index] = torch.ones(2)
    device[index] = torch.tensor(5.0)
    assert device.tolist() == [5, 5, 0]


def test_integers_are_counted(musa: str) -> None:
    x = torch.tensor([0, 2, 2, 3, 7], dtype=torch.int32, device=musa)
    counts = torch.histc(x, bins=4, min=0, max=3)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [1, 0, 2, 1])
    assert torch.histc(x.float(), bins=4, min=0, max=3).tolist() == [1, 0, 2, 1]


def test_convolutions_are_laid_out_as_their_fake_kernel_says(musa: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = randn(2, 3, 6, 6).to(memory_format=torch.channels_last).to(musa).requires_grad_()
    for op, w in ((F.conv2d, randn(4, 3, 2, 2)), (F.conv_transpose2d, randn(3, 4, 2, 2))):
        w = w.to(memory_format=torch.channels_last).to(musa).requires_grad_()
        mode = FakeTensorMode()
        fake = op(mode.from_tensor(x), mode.from_tensor(w))
        got = op(x, w)
        assert got.stride() == fake.stride()
        grads = torch.autograd.grad(got.sum(), (x, w))
        fakes = torch.ops.aten.convolution_backward(
            fake, mode.from_tensor(x), mode.from_tensor(w), None, [1, 1], [0, 0], [1, 1],
            op is F.conv_transpose2d, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        assert [g.stride() for g in grads] == [g.stride() for g in fakes[:2]]


def test_dynamo_does_not_compile_the_kernels(musa: str) -> None:
    from torch._dynamo.utils import counters

    def breaks(x: torch.Tensor) -> torch.Tensor:
        y = x[x > 0]  # run between two graphs, in Python that Dynamo watches
        return y.sum() * x.nonzero().sum()

    torch._dynamo.reset()
    counters.clear()
    x = randn(40)
    got = torch.compile(breaks, backend="eager")(x.to(musa))
    torch.testing.assert_close(got.cpu(), breaks(x))
    assert counters["frames"]["total"] < 10
