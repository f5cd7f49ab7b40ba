"""What a launcher says of this process: `accelerate launch`, torchrun, or a scheduler's script. Imports no torch."""

from __future__ import annotations

import os

from unigrpo_cli.errors import UsageError


def launched() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine, from RANK, WORLD_SIZE and LOCAL_RANK; 0, 1, 0 without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        world = int(os.environ.get("WORLD_SIZE") or 1)
        rank = int(os.environ.get("RANK") or 0)
        local = int(os.environ.get("LOCAL_RANK") or 0)
    except ValueError as error:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UsageError(f"{given}: not whole numbers; start with `accelerate launch` or torchrun") from error
    if not 0 <= rank < world or local < 0:
        raise UsageError(f"RANK={rank} of WORLD_SIZE={world}: start with `accelerate launch` or torchrun")
    return rank, world, local


def address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"WORLD_SIZE is above 1 with MASTER_ADDR={host} and MASTER_PORT={port or None}: set both to the address of "
            "rank 0 and a free port, or start with `accelerate launch` or torchrun"
        )
    return host, int(port)
