"""Which endpoint of a model gets the next request."""

from collections.abc import Sequence


class Load:
    """What is under way at one endpoint, as this worker sees it."""

    __slots__ = ("in_flight", "served")

    def __init__(self) -> None:
        # All mutable state: requests under way now, and leases ever given.
        self.in_flight = 0
        self.served = 0

    def __repr__(self) -> str:
        return f"<Load in_flight={self.in_flight} served={self.served}>"

    def lease(self) -> "Lease":
        """Count one more request here until the lease is released."""
        self.in_flight += 1
        self.served += 1
        return Lease(self)


class Lease:
    """One request at one endpoint. `release()` may be called any number of times; it counts once."""

    __slots__ = ("_load",)

    def __init__(self, load: Load) -> None:
        self._load: Load | None = load

    def __repr__(self) -> str:
        return f"<Lease {'held' if self._load else 'released'}>"

    def release(self) -> None:
        if self._load:
            self._load.in_flight -= 1
            self._load = None


def least_loaded(loads: Sequence[Load]) -> int:
    """Return the index of the endpoint with the fewest requests in flight; of equals, the least used."""
    best = 0
    for i, load in enumerate(loads):
        fewest = loads[best]
        if load.in_flight < fewest.in_flight or (load.in_flight == fewest.in_flight and load.served < fewest.served):
            best = i
    return best
