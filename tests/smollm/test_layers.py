"""A projection is the same product whichever library multiplies, a norm the same in any type."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from smollm.attention.layers import ONEDNN_PAYS, Linear, RMSNorm, linear
from smollm.model.head import TiedHead

K = 256
N = ONEDNN_PAYS // K
WITH_ONEDNN = mkldnn.is_available()  # PyTorch's own product gives the same without


class Called(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def by_onednn(x, weight, bias=None):
    with Called() as called:
        linear(x, weight, bias)
    return any("mkldnn" in name for name in called.names)


def close(y, x, weight, bias):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(K,), (1, K), (1, 1, K), (2, 3, K), (0, K), (2, 0, K), (65, K)])
@pytest.mark.parametrize("bias", [None, torch.randn(N)], ids=["", "bias"])
@torch.no_grad()
def test_rows_of_any_shape(shape, bias):
    x, weight = torch.randn(shape), nn.Parameter(torch.randn(N, K))
    y = linear(x, weight, bias)
    assert y.shape == (*shape[:-1], N) and y.is_contiguous()
    close(y, x, weight, bias)
    assert by_onednn(x, weight, bias) == WITH_ONEDNN


@torch.no_grad()
def test_strided_rows_and_weights_in_the_middle_of_a_buffer():
    weight = torch.randn(N * K + 1)[1:].view(N, K)
    for x in (
        torch.randn(5, 3, K).transpose(0, 1),
        torch.randn(5, 2 * K)[:, ::2],
        torch.randn(1, K).expand(4, K),
    ):
        close(linear(x, weight), x, weight, None)
        assert by_onednn(x, weight) == WITH_ONEDNN


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_row_and_column():
    x, weight = torch.randn(3, K), torch.randn(N, K)
    x[1, 4], weight[2, 5] = float("nan"), float("inf")
    y = linear(x, weight)
    assert y.isnan().nonzero()[:, 0].unique().tolist() == [1]
    assert y[[0, 2]].isinf().nonzero()[:, 1].unique().tolist() == [2]


class Subclass(torch.Tensor):
    """A weight that is multiplied in its own way, as a quantised one is."""


@pytest.mark.parametrize(
    "x, weight, context",
    [
        (torch.randn(2, K), torch.randn(N, K), torch.enable_grad),
        (torch.randn(2, K), torch.randn(N - 1, K), nullcontext),
        (torch.randn(2, K).bfloat16(), torch.randn(N, K).bfloat16(), nullcontext),
        (torch.randn(2, K).double(), torch.randn(N, K).double(), nullcontext),
        (torch.randn(2, K), torch.randn(K, N).t(), nullcontext),
        (torch.randn(2, K), torch.randn(N, K).as_subclass(Subclass), nullcontext),
        (torch.randn(2, K), torch.randn(N, K), lambda: torch.autocast("cpu")),
        (torch.randn(2, K), torch.randn(N, K), lambda: mkldnn.flags(enabled=False)),
        (torch.randn(2, K), torch.randn(N, K), forward_ad.dual_level),
        (torch.randn(2, K, device="meta"), torch.randn(N, K, device="meta"), nullcontext),
    ],
    ids=[
        "grad", "small", "half", "double", "transposed", "subclass", "autocast", "disabled", "dual",
        "meta",
    ],
)  # fmt: skip
def test_all_else_is_left_to_pytorch(x, weight, context):
    with torch.no_grad(), context():
        assert not by_onednn(x, weight)
        assert linear(x, weight).shape == (2, len(weight))


@pytest.mark.parametrize("shape", [(2, K - 1), (2, K + 44), ()])
def test_rows_of_another_width_are_refused_in_pytorchs_words(shape):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|1D"):
        linear(torch.randn(shape), torch.randn(N, K))


def test_without_values_nothing_is_multiplied():
    with torch.no_grad(), FakeTensorMode():
        assert linear(torch.randn(2, K), torch.randn(N, K)).shape == (2, N)


def test_transforms_go_through_it():
    x, weight, tangent = torch.randn(3, K), torch.randn(N, K), torch.randn(3, K)
    with torch.no_grad():
        _, out = torch.func.jvp(lambda x: linear(x, weight), (x,), (tangent,))
        close(out, tangent, weight, None)
        close(torch.vmap(lambda x: linear(x, weight))(x), x, weight, None)


def test_a_layer_and_the_head_take_it():
    for layer in (Linear(K, N), TiedHead(nn.Embedding(N, K))):
        with torch.no_grad(), Called() as called:
            layer(torch.randn(1, K))
        assert any("mkldnn" in name for name in called.names) == WITH_ONEDNN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_takes_its_weight_in_the_inputs_type(dtype):
    norm, x = RMSNorm(K, eps=1e-5), torch.randn(3, K).to(dtype)
    nn.init.normal_(norm.weight, mean=1.0)
    y = norm(x)
    exact = F.rms_norm(x.double(), (K,), norm.weight.double(), 1e-5)
    assert y.dtype == dtype
    assert torch.equal(y, F.rms_norm(x, (K,), norm.weight.to(dtype), 1e-5))
    torch.testing.assert_close(y.double(), exact, atol=0.0, rtol=2 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert norm.weight.grad.dtype == torch.float32
