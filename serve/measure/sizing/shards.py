"""What a volume of any size costs by shards: a model of few inputs, each measured on a small volume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve.measure.sizing.simulation import volume_hours

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class ShardCost:
    """What segmenting a volume by shards takes; all grows in proportion to the pixels.

    Attributes:
        shards: in all, each with one marker.
        server_hours: of one server.
        client_hours: CPU hours of the tasks that read, send, receive and write.
        lost_s: seconds of one server that a killed task costs on average: half a shard.
    """

    shards: int
    server_hours: float
    client_hours: float
    lost_s: float

    def __str__(self) -> str:
        return (
            f"{self.shards:,} shards, {self.server_hours:,.0f} server hours, {self.client_hours:,.0f} CPU hours of the "
            f"tasks; a killed task costs {self.lost_s:.1f} s of a server"
        )


def shard_cost(pixels: float, shard_mpx: float, img_per_s: float, tile_size: int, client_mpx_per_s: float) -> ShardCost:
    """The cost of a volume.

    Args:
        pixels: of it.
        shard_mpx: million pixels of a shard.
        img_per_s: tiles a second of one server.
        tile_size: rows and columns of a tile.
        client_mpx_per_s: million pixels that a task handles in a second of CPU time.
    """
    shard_pixels = shard_mpx * 1e6
    return ShardCost(
        math.ceil(pixels / shard_pixels),
        volume_hours(img_per_s, tile_size, pixels),
        pixels / 1e6 / client_mpx_per_s / _SECONDS_PER_HOUR,
        volume_hours(img_per_s, tile_size, shard_pixels) * _SECONDS_PER_HOUR / 2,
    )
