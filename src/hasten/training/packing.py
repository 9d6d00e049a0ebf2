"""Several short items in one row: which go together.

Padded to the longest of its batch, a short item costs as much as a long one. Best fit over falling sizes fills rows
instead: the largest item that is left goes where the least room remains after it. It needs at most 11/9 of the fewest
rows possible, and 4 more (Johnson 1973, "Near-optimal bin packing algorithms"); with many short items hardly more than
the fewest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The indices of `sizes` in bins that hold at most `room`, each index once."""
    bins: list[list[int]] = []
    open_: dict[int, list[int]] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # the keys of open_, rising
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = bisect_left(rooms, sizes[item])
        if place == len(rooms):
            chosen, left = len(bins), room - sizes[item]
            bins.append([])
        else:
            chosen, left = open_[rooms[place]].pop(), rooms[place] - sizes[item]
            if not open_[rooms[place]]:
                del open_[rooms.pop(place)]
        bins[chosen].append(item)
        if left:
            if left not in open_:
                insort(rooms, left)
            open_.setdefault(left, []).append(chosen)
    return bins
