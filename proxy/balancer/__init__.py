"""Which endpoint of a model gets the next request."""

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from random import random
from typing import Protocol, TypeVar

import msgspec

from proxy.balancer import gauges, policies, prefixes
from proxy.balancer.board import Block, Board
from proxy.balancer.gauges import Gauges, Seen
from proxy.balancer.load import (
    ASKED,
    DISTRUST,
    FOUND,
    PREFILLED,
    PRIOR_RATE,
    SECONDS,
    Ask,
    Lease,
    Load,
    Scale,
    Told,
)
from proxy.balancer.policies import Chance
from proxy.balancer.prefixes import Prompt
from proxy.config import Balance

__all__ = ["Ask", "Balancer", "Board", "Candidate", "Lease", "Load", "Prompt"]

_SHORT = 2048  # bytes of a request whose prompt is computed so soon that it does not matter where its start is cached
_LOOK = 0.25  # seconds between two looks at what was learned


class Candidate(Protocol):
    """An endpoint. most: requests that it may have in flight, None for any number."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def max_in_flight(self) -> int | None: ...


C = TypeVar("C", bound=Candidate)


class _Group:
    """The endpoints of one model."""

    def __init__(self, model: str, names: Sequence[str], policy: Balance, block: Block, glance: float) -> None:
        self.model = model
        self._glance = glance
        self.scale = Scale()
        # All mutable state: the loads that there ever were and where their doubles are, the number of the last lease,
        # leases whose first token will not be seen by when it is due, what was last seen of each endpoint's cache, and
        # when all was last brought up to date. See `follow` for the rest.
        self._ever: dict[str, Load] = {}
        self._homes: dict[str, Block] = {}
        self.number = 0
        self._unseen: list[tuple[float, int, Lease]] = []
        self._seen: dict[str, Seen] = {}
        self._glanced = self._looked = float("-inf")
        self.follow(names, policy, block)

    def __repr__(self) -> str:
        return f"<_Group {self.model} {self.policy} {self.everything!r}>"

    def follow(self, names: Sequence[str], policy: Balance, block: Block) -> None:
        """Have these endpoints from now on. What is under way and was learned at those that stay goes on."""
        for i, name in enumerate(names):
            doubles = block.live(i), block.slow(i), block.newest(i)
            if name not in self._ever:
                self._ever[name] = Load(*doubles, index=i, scale=self.scale)
            elif block is not self._homes[name]:
                self._ever[name].move(*doubles, i)
            self._homes[name] = block
        self.policy, self._block, self.table = policy, block, block.table
        self.loads = {name: self._ever[name] for name in names}
        for load in self.loads.values():
            load.rated = policy == "adaptive"
        self.everything = list(self.loads.values())
        self.only = self.everything[0] if len(self.everything) == 1 else None
        self.nothing = [0.0] * len(self.everything)

    def update(self, now: float) -> None:
        """Take in what the other workers have done, and what was learned."""
        if self._block.shared and now - self._glanced >= self._glance:
            self._glanced = now
            self.update_live()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._look(now)

    def update_live(self) -> None:
        """Take in what the other workers have under way."""
        sums = self._block.live_sums()
        for load, in_flight, tokens in zip(self.everything, *sums, strict=True):
            load.in_flight, load.tokens = in_flight, tokens

    def _look(self, now: float) -> None:
        for load in self.everything:
            load.fade(now)
        sums = self._block.slow_sums()
        mean = (sum(sums[PREFILLED]) + PRIOR_RATE) / (sum(sums[SECONDS]) + 1.0)
        for load, figures in zip(self.everything, zip(*sums, strict=True), strict=True):
            load.learn(figures, mean)

    def expect(self, lease: Lease, due: float) -> None:
        """The first token of this one will not be seen: answers that are no streams come whole."""
        heappush(self._unseen, (due, self.number, lease))

    def expire(self, now: float) -> None:
        """Take prompts whose first token is not seen for computed when that is due."""
        while self._unseen and self._unseen[0][0] <= now:
            heappop(self._unseen)[2].token(None)

    def told(self, name: str, said: Gauges | None) -> None:
        """Take what an engine says of itself; None if it does not answer."""
        load = self.loads[name]
        if said is None:
            load.told(Told())
            return
        if self._block.shared:
            self.update_live()
        slow = [figure[load.index] for figure in self._block.slow_sums()]
        now = Seen(said.queries, said.hits, slow[ASKED], slow[FOUND])
        load.told(gauges.judge(said, load.in_flight, now, self._seen.get(name, Seen()), slow[DISTRUST]))
        self._seen[name] = now


class Balancer:
    """Chooses endpoints for one worker. A model with one endpoint costs a count and nothing else."""

    def __init__(
        self, endpoints: Mapping[str, Sequence[str]], policy: Mapping[str, Balance], board: Board,
        chance: Chance = random, glance: float = 0.0,
    ) -> None:  # fmt: skip
        """endpoints: all names that a model's endpoints may have. policy: of each model.

        glance: seconds for which what the other workers have under way is taken to stand; 0: it is read for each pick.
        """
        self._chance = chance
        self._board = board
        self._glance = glance
        # All mutable state: the endpoints of each model that there ever was.
        self._groups: dict[str, _Group] = {}
        self.follow(endpoints, policy)

    def __repr__(self) -> str:
        return f"<Balancer {list(self._groups.values())!r}>"

    def follow(self, endpoints: Mapping[str, Sequence[str]], policy: Mapping[str, Balance]) -> None:
        """Have these models and endpoints, in the places that the board has for them by now.

        Models that are gone stay for the requests that are under way there.
        """
        for model, names in endpoints.items():
            block = self._board.block(model)
            if model in self._groups:
                self._groups[model].follow(names, policy[model], block)
            else:
                self._groups[model] = _Group(model, names, policy[model], block, self._glance)

    def loads(self, model: str) -> Sequence[Load]:
        """Return what is under way at each endpoint of a model."""
        return self._groups[model].everything

    def prompt(
        self, model: str, fields: Mapping[str, bytes | msgspec.Raw], salt: str | None = None, size: int = _SHORT
    ) -> Prompt | None:
        """Return the prompt of a request as `pick` wants it: None where it makes no difference, at no cost.

        size: of the whole request in bytes.
        """
        return None if size < _SHORT or self._groups[model].table is None else prefixes.read(fields, salt)

    def pick(
        self, model: str, candidates: Sequence[C], prompt: Prompt | None, now: float, streamed: bool = True
    ) -> tuple[C, Lease] | None:
        """Choose one of the candidates and take a lease; None if all have as many requests as they may have.

        now: seconds of a clock that never goes back; the lease wants the same. prompt: see `prompt`.
        """
        group = self._groups[model]
        group.number += 1
        if group.only is not None and candidates and candidates[0].max_in_flight is None:
            return candidates[0], group.only.lease(None, now)
        group.update(now)
        able, loads = _able(candidates, group.loads)
        if not able:
            return None
        if prompt is None or group.table is None:
            i = self._choose(group, able, loads, now)
            return able[i], loads[i].lease(None, now, group.number)
        i, ask = self._predict(group, loads, prompt, now, streamed=streamed)
        lease = loads[i].lease(ask, now, group.number)
        if not streamed:
            group.expect(lease, now + loads[i].tokens / loads[i].rate)
        return able[i], lease

    def has_room(self, model: str, candidates: Sequence[Candidate], now: float) -> bool:
        """Say whether one of the candidates has fewer requests than it may have."""
        if any(candidate.max_in_flight is None for candidate in candidates):
            return True
        group = self._groups[model]
        group.update(now)
        return bool(_able(candidates, group.loads)[0])

    def on_release(self, model: str, freed: Callable[[], None]) -> None:
        """Have something called whenever a request of this worker for a model is over."""
        for load in self._groups[model].everything:
            load.freed = freed

    def told(self, model: str, endpoint: str, said: Gauges | None) -> None:
        """Take what the engine behind an endpoint says of itself, None if nothing. One worker does so for all."""
        self._groups[model].told(endpoint, said)

    def _choose(self, group: _Group, able: Sequence[Candidate], loads: Sequence[Load], now: float) -> int:
        policy = group.policy
        if policy == "predicted_ttft":
            group.expire(now)
            return policies.predicted_ttft(loads, group.nothing, self._chance)
        if policy == "round_robin":
            return policies.round_robin(loads)
        if policy == "weighted_random":
            return policies.weighted_random([c.weight for c in able], self._chance)
        if policy == "adaptive":
            return policies.adaptive(loads, now)
        return policies.least_loaded(loads)

    def _predict(
        self, group: _Group, loads: Sequence[Load], prompt: Prompt, now: float, *, streamed: bool
    ) -> tuple[int, Ask]:
        """Choose by predicted_ttft, note the prompt where it goes, and say what it asks there."""
        table, all_loads = group.table, group.everything
        assert table is not None
        group.expire(now)
        found = table.found(prompt, [load.oldest for load in all_loads])
        per_byte, size = group.scale.tokens_per_byte, prompt.size
        whole, each = size * per_byte, prompt.share * per_byte
        uncached = [whole - load.trust * each * found[load.index] for load in loads]
        i = policies.predicted_ttft(loads, uncached, self._chance)
        load = loads[i]
        table.note(prompt, load.index, load.advance(size - prompt.share * found[load.index]))
        return i, Ask(size, whole, uncached[i], streamed)


def _able(candidates: Sequence[C], loads: Mapping[str, Load]) -> tuple[list[C], list[Load]]:
    """Return the candidates that may have one more request, and their loads."""
    able, theirs = [], []
    for candidate in candidates:
        load, most = loads.get(candidate.name), candidate.max_in_flight
        if load is not None and (most is None or load.in_flight < most):  # None: it is gone, by a new configuration
            able.append(candidate)
            theirs.append(load)
    return able, theirs
