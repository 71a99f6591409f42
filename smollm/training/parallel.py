"""The processes that train one run together, as `torchrun` starts them, or one alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smollm.model import SmolLM
from smollm.training.torchrun import world_size


class World:
    """This process among those that train together.

    Numbers that steer them are exchanged between CPUs, so that no GPU is waited for. A process that
    dies ends the exchange with an error in the others.

    Args:
        rank: which it is, from 0; the first one alone writes files and prints.
        size: how many there are.
        device: what it trains on.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums of the processes' numbers, by place; all of them call it."""
        if self.alone:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """The first process's value; all of them call it."""
        if self.alone:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors on their devices; all of them call it."""
        if not self.alone:
            torch.distributed.all_reduce(x)
        return x


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if PyTorch sees one.

    Raises:
        ValueError: it sees none, and "cuda" was asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' or 'auto' (PyTorch sees no GPU), got 'cuda'")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the other processes of `torchrun`, if there are any.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    place = find_device(device)
    if world_size() == 1:
        yield World(0, 1, place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(torch.distributed.get_rank(), torch.distributed.get_world_size(), place)
    finally:
        torch.distributed.destroy_process_group()


def distribute(model: SmolLM, world: World, *, fsdp: bool) -> nn.Module:
    """What trains a model on all processes: itself sharded (FSDP2), or wrapped (DDP)."""
    if world.alone:
        return model
    if not fsdp:
        places = [world.device] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=places)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def accumulating(network: nn.Module, *, last: bool) -> Any:
    """In which a backward is run: gradients are exchanged in a step's last one alone."""
    inner: Any = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    if hasattr(inner, "set_requires_gradient_sync"):
        inner.set_requires_gradient_sync(last)
    elif not last and hasattr(inner, "no_sync"):
        return inner.no_sync()
    return nullcontext()


def full_states(
    model: SmolLM, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a sharded model and its optimizers, whole on the first process's CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizers, options=options)


def load_full_states(
    model: SmolLM,
    optimizers: list[torch.optim.Optimizer],
    states: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Take up what `full_states` gave, on every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizers,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=StateDictOptions(full_state_dict=True),
    )
