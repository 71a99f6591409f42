"""Triton's interpreter made fast enough for tests, of the same bits but in products of tiles.

It takes as long for an operation on a large tile as on a small one, and runs a launch's programs
one after the other. `run_programs_at_once` gives every array one more axis in front, of programs,
which types do not show; it is 1 long where all have the same. Programs that disagree on a condition
or on the turns of a loop start again, in groups that agree. So no kernel may read what it writes,
nor may it on a GPU, where programs have no order.
"""

import builtins
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests import remembered

REFUSED = "create_atomic", "create_cat", "create_descriptor", "create_gather", "create_histogram"


class DisagreementError(Exception):
    """What the programs of a group have in a scalar that decides what they do."""

    def __init__(self, values: np.ndarray):
        self.values = values


def hasten() -> None:
    """Spare each of its calls what it does over and over, and round products as on any machine.

    It patches triton.language for each module of jit helpers, not at each of their calls, looks up
    types once, and checks no array's size, and no integer for overflow unless it is told to.
    """
    patched: set[str] = set()
    types: dict[str, np.dtype] = {}
    type_of, patch_tensor = interpreter._get_np_dtype, interpreter._patch_lang_tensor

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def known_type_of(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = type_of(dtype)
        return types[name]

    def patch_index(tensor, *scope):  # Triton 3.6 makes no integers of NumPy 2.4's arrays
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_index
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = known_type_of
    TensorHandle.__post_init__ = lambda self: None
    InterpreterBuilder.create_dot = create_dot
    _remember_shapes()
    check_overflow(False)


def check_overflow(on: bool) -> None:
    """Whether sums and products of integers that leave 32 bits are refused."""
    remembered.forget()
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", on)


def _remember_shapes() -> None:
    """Make those of types and of tensors once, which takes longer than most operations."""
    new_type, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}

    def make_type(self, element_ty, shape):
        key = element_ty.name, *map(operator.index, shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def make_tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            new_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor


def run_programs_at_once() -> None:
    """From now on, in this process."""
    for name in dir(InterpreterBuilder):
        if name.startswith(REFUSED):
            setattr(InterpreterBuilder, name, _refuse)
    for change in (
        create_get_program_id, create_make_range, create_splat, create_unsplat, create_expand_dims,
        create_broadcast, create_reshape, create_trans, create_masked_load, create_masked_store,
    ):  # fmt: skip
        setattr(InterpreterBuilder, change.__name__, change)
    interpreter.ReduceOps, interpreter.ScanOps = Reduce, Scan
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.GridExecutor.__call__ = launch
    interpreter.range = loop  # kernels find the names of this module
    remembered.remember_helpers()


def launch(self, *args, **kwargs) -> None:
    """Run the kernel of a GridExecutor."""
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    arguments = {
        name: given[name] if name in self.constexprs else interpreter._implicit_cvt(given[name])
        for name in self.arg_names
    }
    (programs,) = self.grid
    scope = interpreter._patch_lang(self.fn)
    groups = [np.arange(programs, dtype=np.int32)]
    try:
        while groups:
            group = InterpreterBuilder.programs = groups.pop()
            try:
                self.fn(**arguments)
            except DisagreementError as error:
                groups += [group[error.values == value] for value in np.unique(error.values)]
    finally:
        scope.restore()


_patch_tensor_of_one_program = interpreter._patch_lang_tensor


def _patch_tensor(tensor, *scope) -> None:
    _patch_tensor_of_one_program(tensor, *scope)
    tensor.__bool__ = lambda self: self.type.is_block() or _agreed(self.handle.data != 0)
    tensor.__index__ = lambda self: _agreed(self.handle.data)


def _agreed(values: np.ndarray) -> Any:
    """The one value of a scalar in all programs of a group."""
    remembered.look()
    if len(values) > 1 and (values != values[0]).any():
        raise DisagreementError(values)
    return values[0].item()


def loop(*bounds) -> Iterable[Any]:
    """What range() is in a kernel; programs begin where they like, and turn equally often."""
    if not any(isinstance(bound, tl.tensor) for bound in bounds):
        return builtins.range(*bounds)
    first, *rest = (
        x.handle.data if isinstance(x, tl.tensor) else np.array([x], np.int32) for x in bounds
    )
    start, stop = (first, rest[0]) if rest else (0 * first, first)
    step = rest[1] if rest[1:] else 1
    turns = _agreed(np.maximum(-((start - stop) // step), 0))
    return (
        tl.tensor(TensorHandle(start + turn * step, tl.int32), tl.int32)
        for turn in builtins.range(turns)
    )


def _refuse(*_: Any, **__: Any) -> None:
    raise NotImplementedError("expected an operation that all programs can do at once")


def create_get_program_id(self, axis):
    assert axis == 0
    return TensorHandle(self.programs, tl.int32)


def create_make_range(self, ret_ty, start, stop):
    return TensorHandle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)


def create_splat(self, ret_ty, arg):
    data = arg.data.astype(interpreter._get_np_dtype(arg.dtype), copy=False)
    data = data.reshape(-1, *(1,) * len(ret_ty.shape))
    return TensorHandle(_broadcast(data, (len(data), *ret_ty.shape)), arg.dtype.scalar)


def create_unsplat(self, arg):
    return TensorHandle(arg.data.reshape(len(arg.data)), arg.dtype.scalar)


def create_expand_dims(self, arg, axis):
    return TensorHandle(np.expand_dims(arg.data, axis + 1), arg.dtype.scalar)


def create_broadcast(self, arg, shape):
    return TensorHandle(_broadcast(arg.data, (len(arg.data), *shape)), arg.dtype.scalar)


def _broadcast(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """np.broadcast_to, which takes longer than to add what it returns."""
    if not data.flags.c_contiguous:
        return np.broadcast_to(data, shape)
    strides = [
        0 if here < there else stride
        for here, there, stride in zip(data.shape, shape, data.strides, strict=True)
    ]
    return np.ndarray(shape, data.dtype, data, strides=strides)


def create_reshape(self, arg, shape, allow_reorder):
    return TensorHandle(arg.data.reshape(len(arg.data), *shape), arg.dtype.scalar)


def create_trans(self, arg, perm):
    return TensorHandle(arg.data.transpose(0, *(axis + 1 for axis in perm)), arg.dtype.scalar)


def create_dot(self, a, b, d, *how):
    """In fp64 and rounded once: the same bits on every machine, and of the transposed product."""
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


_masked_load = InterpreterBuilder.create_masked_load
_masked_store = InterpreterBuilder.create_masked_store


def create_masked_load(self, ptrs, mask, other, *how):
    return _masked_load(self, *_together(ptrs, mask, other), *how)


def create_masked_store(self, ptrs, value, mask, *how):
    return _masked_store(self, *_together(ptrs, value, mask), *how)


def _together(*handles):
    """With as many programs each, as memory is accessed element by element."""
    arrays = iter(np.broadcast_arrays(*(x.data for x in handles if x is not None)))
    return [None if x is None else TensorHandle(next(arrays), x.dtype) for x in handles]


class _OfPrograms:
    """An operation along an axis of tiles, or along all of them."""

    def check_axis(self, shape, axis):
        self.axes = len(shape)

    def apply_impl(self, input):
        whole = tuple(range(1, 1 + self.axes))
        self.axis = whole if self.axis is None else whole[self.axis]
        (x,) = input

        def apply(handle):
            (result,) = self._apply(tl.tensor(handle, x.type))
            return result.handle

        result = self._apply(x)
        remembered.note(apply, (x.handle,), result[0].handle)
        return result

    def _apply(self, x):
        result = super().apply_impl((x,))
        return result if isinstance(result, list) else [result]

    def to_tensor(self, data, dtype):
        shape = data.shape[1:]
        handle = TensorHandle(data.astype(interpreter._get_np_dtype(dtype), copy=False), dtype)
        return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)

    generic_reduce = generic_scan = _refuse


class Reduce(_OfPrograms, interpreter.ReduceOps):
    pass


class Scan(_OfPrograms, interpreter.ScanOps):
    pass
