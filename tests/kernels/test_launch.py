"""How kernels are launched: on whose device, with which strides; and how numbers are rounded."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

import kernels
from kernels.core.launch import MOST_COMPILED, hopper_faults, launch
from kernels.core.primitives import cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Recorder:
    """Stands in for a kernel of these arguments and keeps what its launches are given."""

    arg_names = ("x_ptr", "x_strides", "y_ptr", "n")

    def __init__(self):
        self.launches, self.devices, self.current = [], [], None

    def __getitem__(self, grid):
        def run(*values, **options):
            self.launches.append((grid, dict(zip(self.arg_names, values, strict=True))))
            self.devices.append(self.current)

        return run

    @contextmanager
    def device_of(self, x):
        self.current = x.device
        yield
        self.current = None


def strides(arguments):
    """Those of x that a launch was given, and that of its columns."""
    batch, row, head = arguments["x_strides"]
    return batch, row.value, head, 1


def launched(x, y, programs=3):
    """The arguments of a launch."""
    recorder = Recorder()
    launch(recorder, programs, x_ptr=x, y_ptr=y, n=7)
    ((grid, arguments),) = recorder.launches
    assert grid == (programs,) and arguments["n"] == 7
    assert strides(arguments) == arguments["x_ptr"].stride()
    assert torch.equal(arguments["x_ptr"], x) and torch.equal(arguments["y_ptr"], y)
    return arguments


def test_a_launch_runs_on_the_device_of_its_tensors():
    recorder, x = Recorder(), torch.zeros(1, 2, 3, 4, device="meta")
    with mock.patch.object(torch.cuda, "device_of", recorder.device_of):
        launch(recorder, 5, x_ptr=x, y_ptr=None, n=7)
    assert recorder.devices == [x.device] and recorder.current is None


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        (("3.6.0", "12.8"), ["triton 3.6.0", "ptxas 12.8"]),
        (("3.7.1", "12.8"), ["ptxas 12.8"]),
        (("3.8.0+git1", "13.3"), []),
        (("3.10.0", "14.0"), []),
    ],
)
def test_known_faults_of_compilers_are_named(versions, named):
    faults = hopper_faults(*versions)
    assert [fault[: len(name)] for fault, name in zip(faults, named, strict=True)] == named


def test_no_program_is_no_launch():
    recorder = Recorder()
    launch(recorder, 0, x_ptr=torch.zeros(1, 0, 3, 4), n=7)
    assert recorder.launches == []


def test_strides_are_kept_where_a_kernel_takes_them():
    x, y = torch.randn(2, 3, 4, 9)[..., :5].transpose(1, 2), torch.randn(6, 2)[:, 1]
    arguments = launched(x, y)
    assert arguments["x_ptr"] is x and arguments["y_ptr"].stride() == (1,)


def test_rows_of_one_head_need_no_dimension_of_heads():
    x = torch.randn(2, 3, 9)[..., :5]
    recorder = Recorder()
    launch(recorder, 1, x_ptr=x, y_ptr=None, n=7)
    ((_, arguments),) = recorder.launches
    assert arguments["x_ptr"] is x and strides(arguments) == (27, 9, 0, 1)


def test_columns_apart_are_copied():
    assert launched(torch.randn(2, 3, 4, 5).mT, torch.ones(1))["x_ptr"].stride(-1) == 1
    x = torch.randn(2, 3, 4, 5)[..., 2:3]
    assert launched(x, torch.ones(1))["x_ptr"] is x


@pytest.mark.parametrize(("tokens", "copied"), [(1, False), (16, False), (17, True), (1000, True)])
def test_rows_too_far_apart_for_32_bits_are_copied(tokens, copied):
    """Rows of a tile are 2^27 elements apart: 16 of them end before 2^31."""
    x = torch.empty(1, dtype=torch.float16, device="meta")
    x = torch.as_strided(x.new_empty(1 + tokens * 2**27), (1, tokens, 1, 1), (1, 2**27, 1, 1))
    recorder = Recorder()
    launch(recorder, 1, x_ptr=x, y_ptr=None, n=7)
    ((_, arguments),) = recorder.launches
    assert (arguments["x_ptr"] is not x) == copied
    assert strides(arguments) == ((tokens, 1, 1, 1) if copied else x.stride())


class Compiler(Recorder):
    """A recorder whose launches compile, and which keeps those of what they have compiled apart."""

    def __init__(self):
        super().__init__()
        self.again = []

    def __getitem__(self, grid):
        launch, compiler = super().__getitem__(grid), self

        class Compiled(CompiledKernel):
            module = None  # to unload

            def __init__(self):
                pass

            def __getitem__(self, grid):
                return lambda *values: compiler.again.append(
                    (grid, dict(zip(compiler.arg_names, values, strict=True)))
                )

        def run(*values, **options):
            launch(*values, **options)
            return Compiled()

        return run


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(driver, "_active", object())
    return Compiler()


def test_a_launch_like_one_before_needs_no_compiler(compiler):
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(6)
    launch(compiler, 3, x_ptr=x, y_ptr=y, n=7)
    for other, apart in [(x, y), (x + 1, y + 1), (x + 2, torch.randn(6, 2)[:, 1])]:
        launch(compiler, 3, x_ptr=other, y_ptr=apart, n=7)
        grid, arguments = compiler.again[-1]
        assert grid == (3, 1, 1) and arguments["n"] == 7
        assert arguments["x_ptr"] is other and strides(arguments) == other.stride()
        assert torch.equal(arguments["y_ptr"], apart) and arguments["y_ptr"].is_contiguous()
    assert len(compiler.launches) == 1 and len(compiler.again) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"x_ptr": torch.zeros(2, 3, 4, 5, dtype=torch.float16)},
        {"x_ptr": torch.zeros(121)[1:].view(2, 3, 4, 5)},
        {"x_ptr": torch.zeros(2, 3, 4, 6)[..., :5]},
        {"x_ptr": torch.zeros(2, 4, 3, 5).transpose(1, 2)},
        {"x_ptr": torch.zeros(2, 3, 5)},
        {"y_ptr": None},
        {"y_ptr": torch.zeros(6, dtype=torch.int32)},
        {"y_ptr": torch.zeros(7)[1:]},
        {"n": 8},
        {"num_warps": 8},
        {"programs": 4},
    ],
    ids=["type", "address", "rows", "layout", "dimensions", "absence", "type-of-dense",
         "address-of-dense", "number", "option", "programs"],
)  # fmt: skip
def test_a_launch_unlike_those_before_is_left_to_the_compiler(change, compiler):
    given = {"programs": 3, "x_ptr": torch.zeros(2, 3, 4, 5), "y_ptr": torch.zeros(6), "n": 7}
    for _ in range(2):
        launch(compiler, **given)
        launch(compiler, **given | change)
    assert len(compiler.launches) == len(compiler.again) == 2


def test_a_launch_of_copies_is_left_to_the_compiler(compiler):
    for _ in range(2):
        launch(compiler, 3, x_ptr=torch.zeros(2, 3, 4, 5).mT, y_ptr=None, n=7)
    assert len(compiler.launches) == 2


def test_what_another_driver_compiled_is_not_launched(compiler, monkeypatch):
    x = torch.zeros(2, 3, 4, 5)
    for active in (object(), object()):
        monkeypatch.setattr(driver, "_active", active)
        for _ in range(2):
            launch(compiler, 3, x_ptr=x, y_ptr=None, n=7)
    assert len(compiler.launches) == len(compiler.again) == 2


def test_only_so_many_launches_are_remembered(compiler):
    x = torch.zeros(2, 3, 4, 5)
    for n in (*range(MOST_COMPILED + 1), MOST_COMPILED, 0):
        launch(compiler, 3, x_ptr=x, y_ptr=None, n=n)
    assert len(compiler.again) == 1 and len(compiler.launches) == MOST_COMPILED + 2


def test_attention_over_rows_far_apart():
    """Memory that nobody touches costs nothing."""
    far, tokens = 2**27, 17
    memory = torch.empty(tokens * far, dtype=torch.float16, device=DEVICE)
    k = memory.as_strided((1, tokens, 1, 16), (tokens * far, far, 16, 1))
    k.copy_(torch.randn(1, tokens, 1, 16))
    expected = kernels.attention(*[k.contiguous()] * 3, impl="triton")
    assert torch.equal(kernels.attention(k, k, k, impl="triton"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_gpu_that_is_not_the_current_one():
    q, lengths = torch.randn(2, 33, 3, 16), torch.tensor([33, 9], dtype=torch.int32)
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaf, pressure = q.to(device).requires_grad_(), torch.ones(3, device=device)
        o = kernels.attention(leaf, leaf, leaf)
        o = o + kernels.genetic_attention(leaf, leaf, leaf, pressure, window_size=5)
        decoded = kernels.attention_decode(leaf[:, -1], leaf, leaf, lengths.to(device))
        results.append((o, decoded, *torch.autograd.grad(o.sum(), leaf)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, cast(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounding_is_pytorchs(dtype):
    """Of every number of 16 bits, those next to it and those half way to the next, nan included."""
    upper = torch.arange(2**16)[:, None] << 16
    lower = torch.tensor([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper + lower).flatten().to(torch.uint32).view(torch.float32).to(DEVICE)
    y = torch.empty_like(x, dtype=dtype)
    block = 2**14
    _cast_kernel[(x.numel() // block,)](x, y, BLOCK=block)
    expected = x.to(dtype)
    number = ~x.isnan()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.view(torch.int16)[number], expected.view(torch.int16)[number])
