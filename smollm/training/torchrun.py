"""What `torchrun` tells this process of the others, before it has met them."""

import os


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leading() -> bool:
    """Whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"
