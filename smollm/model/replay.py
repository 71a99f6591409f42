"""Steps that a GPU repeats without the CPU, whose launches take longer than the work."""

from collections.abc import Callable

import torch

WARM_UP = 3  # steps run as they are, in which kernels are compiled and libraries set up
FEWEST = 8  # replays that pay for a capture


def repeated(step: Callable[[], None], times: int, device: torch.device) -> Callable[[], None]:
    """What to call for each of so many steps on a device: a `Replay` where it pays, or the step."""
    if device.type != "cuda" or times < WARM_UP + FEWEST:
        return step
    return step if torch.cuda.is_current_stream_capturing() else Replay(step, device)


class Replay:
    """A step that is captured in a CUDA graph after a few calls, and replayed from then on.

    A call is a step whichever way it runs, so the results, and what is drawn from torch's global
    generator, are those of the step itself.

    Args:
        step: reads and updates tensors in place, always the same ones; reads no number from the
            device, and does the same whatever Python's state is.
        device: the GPU that it runs on.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._warm_up = WARM_UP
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """One step."""
        with torch.cuda.device(self._device):
            if self._warm_up:
                self._warm_up -= 1
                self._run_aside()
                return
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()

    def _run_aside(self) -> None:
        """On the stream of the capture to come, where libraries make their workspaces."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step's launches, none of which has run yet."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: what others do on the GPU must not end the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._step()
        return graph
