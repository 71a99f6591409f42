"""What helpers of kernels ask of Triton's interpreter, remembered.

Triton's language works out at each operation what the types of its operands mean, which takes far
longer than the operation. It follows from types and constants alone: a helper's call is recorded as
what it asks of the interpreter's builder, and calls of the same types and constants ask just that.
Helpers that look at a number, to decide what to do, are never remembered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

SEQUENCES = list, tuple, tl.tuple
CONSTANTS = int, float, str, type(None), tl.dtype, tl.constexpr, InterpretedFunction


class Slot(NamedTuple):
    """Stands for a tensor that a call returns: its place among the handles, and its type."""

    place: int
    type: Any


class Recording:
    """What a call asks. Of its handles those are constants that no operand goes into."""

    def __init__(self, operands: Sequence[TensorHandle]):
        self.handles = list(operands)  # and what is made of them
        self.places = {id(x): place for place, x in enumerate(operands)}
        self.steps: list[tuple[Callable, list[Any], list[tuple[int, int]]]] = []
        self.is_whole = True

    def note(self, ask: Callable, arguments: Sequence[Any], result: Any) -> None:
        handles = [(n, x) for n, x in enumerate(arguments) if isinstance(x, TensorHandle)]
        taken = [(n, self.places[id(x)]) for n, x in handles if id(x) in self.places]
        if any(id(x) not in self.places and id(x) not in constants for _, x in handles):
            self.is_whole = False
        elif taken or "program" in ask.__name__:
            places = dict(taken)
            rest = [None if n in places else x for n, x in enumerate(arguments)]
            self._add(ask, rest, taken, result)
        elif isinstance(result, TensorHandle):
            constants[id(result)] = result

    def _add(self, ask: Callable, rest: list[Any], taken: list[Any], result: Any) -> None:
        self.steps.append((ask, rest, taken))
        self.places[id(result)] = len(self.handles)
        self.handles.append(result)

    def slot(self, x: tl.tensor) -> Slot | None:
        """That of a tensor which the call returns."""
        handle = x.handle
        if id(handle) not in self.places:
            self.is_whole = self.is_whole and id(handle) in constants
            self._add(lambda: handle, [], [], handle)
        return Slot(self.places[id(handle)], x.type)


recordings: list[Recording] = []  # of the calls in progress, the outermost first
constants: dict[int, TensorHandle] = {}  # by their ids, which stay theirs as long as they are here
known: dict[Any, Any] = {}  # steps and result of calls; None of those not to be remembered


class Builder:
    """Triton's, with note taken of what it answers."""

    def __init__(self, builder: Any):
        self.builder = builder

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self.builder, name)
        if not callable(answer):
            return answer

        def ask(*arguments: Any) -> Any:
            result = answer(*arguments)
            note(answer, arguments, result)
            return result

        setattr(self, name, ask)
        return ask


def remember_helpers() -> None:
    """From now on, in this process."""
    run = InterpretedFunction.__call__
    builder = Builder(interpreter.interpreter_builder)
    interpreter.interpreter_builder = interpreter.interpreter_semantic.builder = builder
    InterpretedFunction.__call__ = lambda *args, **kwargs: _call(run, args, kwargs)


def forget() -> None:
    known.clear()


def note(ask: Callable, arguments: Sequence[Any], result: Any) -> None:
    """`ask(*arguments)` was `result`."""
    for recording in recordings:
        recording.note(ask, arguments, result)


def look() -> None:
    """A number decides what the calls in progress do."""
    for recording in recordings:
        recording.is_whole = False


def _call(run: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handles: list[TensorHandle] = []
    key = _key(args, handles), _key(tuple(kwargs.items()), handles)
    if key not in known:
        known[key] = None
        recordings.append(recording := Recording(handles))
        try:
            result = run(*args, **kwargs)
        finally:
            recordings.pop()
        template = _map(result, tl.tensor, recording.slot)
        if recording.is_whole:
            known[key] = recording.steps, template
        return result
    if known[key] is None:
        return run(*args, **kwargs)
    steps, template = known[key]
    for ask, rest, taken in steps:
        arguments = rest.copy()
        for n, place in taken:
            arguments[n] = handles[place]
        handles.append(result := ask(*arguments))
        if recordings:
            note(ask, arguments, result)
    return _map(template, Slot, lambda slot: tl.tensor(handles[slot.place], slot.type))


def _map(x: Any, kind: type, of: Callable) -> Any:
    """x, with of() of all in it that is of a kind."""
    if isinstance(x, kind):
        return of(x)
    if type(x) in SEQUENCES:
        return type(x)([_map(part, kind, of) for part in x])
    if isinstance(x, CONSTANTS):
        return x
    raise TypeError(f"helper: expected tensors, tuples and constants, got {type(x)}")


def _key(x: Any, handles: list[TensorHandle]) -> Any:
    """Types and constants of x, and which of its handles are one; they join the list."""
    kind = type(x)
    if kind is tl.tensor:
        places = [place for place, one in enumerate(handles) if one is x.handle]
        handles += [] if places else [x.handle]
        return x.type.name, *places
    if kind in SEQUENCES:
        return kind, *[_key(part, handles) for part in x]
    if kind is tl.constexpr:
        return kind, _key(x.value, handles)
    if isinstance(x, tl.dtype):
        return kind, x.name
    if isinstance(x, CONSTANTS):
        return kind, x.hex() if kind is float else x
    raise TypeError(f"helper: expected tensors, tuples and constants, got {kind}")
