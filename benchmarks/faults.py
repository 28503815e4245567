"""The faults of `make chaos`: what is done to engines, to the connections to them, and to the cloud.

Engines are killed and stopped by signals. Their connections are harmed by a relay: the engine's socket is linked aside
and the relay's put in its place, in one move, so that neither engine nor proxy is configured otherwise than always. The
supervisor's health checks pass through it too, as they would over a bad network. The cloud is the simulator, which is
told what to do wrong.

The last that is well is not harmed: the cloud only while an engine is well, and it is well again before an engine is
harmed.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import msgspec

from engines.spec import EngineStatus

SLOW = 0.15  # seconds by which each read of an answer is late
_RESPITE = 40.0  # seconds between faults that cost an engine its life; a new one takes longer to start
_LOST = 600.0  # seconds; longer than it takes to find out that an engine is lost
_WAIT = (0.5, 3.5)  # seconds between two faults


class Relay:
    """Between the proxy and one engine."""

    def __init__(self, path: Path) -> None:
        # All mutable state: the listening socket, the connections (their two ends), until when all is held back, until
        # when it comes late.
        self._path = path
        self._aside = path.with_suffix(".engine")
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._ends: set[asyncio.StreamWriter] = set()
        self._silent_until = 0.0
        self._slow_until = 0.0

    def __repr__(self) -> str:
        return f"<Relay {self._path.name} {len(self._ends) // 2} connections>"

    async def keep(self) -> None:
        """Stay between, also when another engine is started, until cancelled."""
        while True:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino != self._inode:
                    await self.step_between()
            await asyncio.sleep(0.05)

    async def step_between(self) -> None:
        """Put our socket in the place of the engine's. At every moment there is one."""
        ours = self._path.with_suffix(".relay")
        for leftover in (ours, self._aside):
            leftover.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._relay, str(ours))
        self._aside.hardlink_to(self._path)
        self._inode = ours.stat().st_ino
        ours.rename(self._path)
        if self._server:
            self._server.close()
        self._server = server

    def cut(self) -> int:
        """End all connections, whatever passes there; return their number."""
        ends = list(self._ends)
        for end in ends:
            end.transport.abort()
        return len(ends) // 2

    def silence(self, seconds: float) -> None:
        """Hold back for so long what the engine says."""
        self._silent_until = asyncio.get_running_loop().time() + seconds

    def slow(self, seconds: float) -> None:
        """Let what the engine says come late for so long."""
        self._slow_until = asyncio.get_running_loop().time() + seconds

    def heal(self) -> None:
        """Do no more harm."""
        self._silent_until = self._slow_until = 0.0

    async def close(self) -> None:
        """Leave the engine alone."""
        self.cut()
        if self._server:
            self._server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes both ways, and the end of either side to the other at once: an engine must learn who went."""
        try:
            from_engine, to_engine = await asyncio.open_unix_connection(str(self._aside))
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, to_engine}
        self._ends |= ends
        ways = [
            asyncio.ensure_future(self._pass(reader, to_engine, self._at_once)),
            asyncio.ensure_future(self._pass(from_engine, writer, self._in_time)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        self._ends -= ends
        for end in ends:
            end.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait: Callable[[], Awaitable[None]]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await wait()
                writer.write(data)
                await writer.drain()

    async def _at_once(self) -> None:
        pass

    async def _in_time(self) -> None:
        now = asyncio.get_running_loop().time()
        late = SLOW if now < self._slow_until else 0.0
        await asyncio.sleep(max(late, self._silent_until - now))


class Victim(msgspec.Struct, frozen=True):
    """An engine that is ready, and what harms it. core: vLLM's process that computes."""

    status: EngineStatus
    server: int
    core: int
    relay: Relay

    @property
    def process(self) -> tuple[str, float]:
        """What tells it from the one that is started in its place."""
        return self.status.id, self.status.since


Victims = Callable[[], Awaitable[list[Victim]]]
Harm = Callable[["Chaos", Victim], Awaitable[None]]


class Kind(msgspec.Struct, frozen=True):
    """A fault. weight: how often it comes. deadly: the engine is lost, and started again. cloud: it is the cloud's."""

    name: str
    weight: int
    harm: Harm
    deadly: bool = False
    cloud: bool = False


class Chaos:
    """Injects faults, chosen by a seed. silence: seconds that are longer than the proxy waits between two tokens."""

    def __init__(self, victims: Victims, cloud: httpx2.AsyncClient, seed: int, silence: float) -> None:
        self._victims = victims
        self._cloud = cloud
        self.silence = silence
        self.chance = random.Random(seed)
        # All mutable state: the chance above, what was done, when an engine was last lost, until when which engine is
        # harmed (both by the event loop's clock), and the processes that are to be woken up again.
        self.done: Counter[str] = Counter()
        self._lost_at = float("-inf")
        self._harmed: dict[tuple[str, float], float] = {}
        self._asleep: set[int] = set()

    def __repr__(self) -> str:
        return f"<Chaos {dict(self.done)}>"

    async def run(self) -> None:
        """Inject faults until cancelled, beginning with the loss of an engine."""
        while True:
            await self._inject()
            await asyncio.sleep(self.chance.uniform(*_WAIT))

    async def heal(self) -> None:
        """Wake up whoever is asleep, and have the cloud be well."""
        for process in list(self._asleep):
            self.wake(process)
        for victim in await self._victims():
            victim.relay.heal()
        await self._cloud.delete("/simulator/faults")

    async def _inject(self) -> None:
        """Choose among the faults that leave somebody who is well."""
        victims = await self._victims()
        now = asyncio.get_running_loop().time()
        well = [v for v in victims if self._harmed.get(v.process, 0.0) < now]
        if not well:
            return
        rested = now - self._lost_at >= _RESPITE
        first = not self.done
        kinds = [k for k in KINDS if (k.deadly if first else (rested or not k.deadly))]
        (kind,) = self.chance.choices(kinds, [k.weight for k in kinds])
        victim = self.chance.choice(well)
        if kind.deadly:
            self._lost_at = now
            self.hurts(victim, _LOST)
        if not kind.cloud:
            await self._cloud.delete("/simulator/faults")
        with contextlib.suppress(ProcessLookupError, httpx2.TransportError):
            await kind.harm(self, victim)
            self.done[kind.name] += 1
            print(f"  {kind.name}" + ("" if kind.cloud else f" of {victim.status.id}"), flush=True)

    def hurts(self, victim: Victim, seconds: float) -> None:
        """Remember that an engine is not well for so long."""
        self._harmed[victim.process] = asyncio.get_running_loop().time() + seconds

    def sleep(self, process: int, seconds: float | None = None) -> None:
        """Stop a process; None: until somebody finds out."""
        os.kill(process, signal.SIGSTOP)
        self._asleep.add(process)
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.wake, process)

    def wake(self, process: int) -> None:
        """Let a process go on."""
        self._asleep.discard(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)

    async def order(self, **fault: object) -> None:
        """Tell the cloud what is wrong with its next requests."""
        (await self._cloud.post("/simulator/faults", json=fault)).raise_for_status()


async def _kill_server(chaos: Chaos, victim: Victim) -> None:
    os.kill(victim.server, signal.SIGKILL)


async def _kill_core(chaos: Chaos, victim: Victim) -> None:
    os.kill(victim.core, signal.SIGKILL)


async def _hang_server(chaos: Chaos, victim: Victim) -> None:
    chaos.sleep(victim.server)


async def _hang_core(chaos: Chaos, victim: Victim) -> None:
    chaos.sleep(victim.core)


async def _pause(chaos: Chaos, victim: Victim) -> None:
    seconds = chaos.chance.uniform(0.5, 3.0)
    chaos.sleep(chaos.chance.choice((victim.server, victim.core)), seconds)
    chaos.hurts(victim, seconds)


async def _cut(chaos: Chaos, victim: Victim) -> None:
    victim.relay.cut()


async def _slow(chaos: Chaos, victim: Victim) -> None:
    victim.relay.slow(6.0)
    chaos.hurts(victim, 6.0)


async def _silence(chaos: Chaos, victim: Victim) -> None:
    victim.relay.silence(chaos.silence)
    chaos.hurts(victim, chaos.silence)


async def _cut_cloud(chaos: Chaos, victim: Victim) -> None:
    await chaos.order(requests=2, cut_after=chaos.chance.randrange(1, 20))


async def _fail_cloud(chaos: Chaos, victim: Victim) -> None:
    await chaos.order(requests=2, error=chaos.chance.choice((500, 502, 503)))


async def _slow_cloud(chaos: Chaos, victim: Victim) -> None:
    await chaos.order(requests=4, slow=5.0)


KINDS = (
    Kind("kill -9 of the API server", 2, _kill_server, deadly=True),
    Kind("kill -9 of the core", 2, _kill_core, deadly=True),
    Kind("SIGSTOP of the API server", 2, _hang_server, deadly=True),
    Kind("SIGSTOP of the core", 2, _hang_core, deadly=True),
    Kind("pause of a few seconds", 2, _pause),
    Kind("connections cut", 6, _cut),
    Kind("connections slow", 3, _slow),
    Kind("connections silent", 2, _silence),
    Kind("cloud cut", 3, _cut_cloud, cloud=True),
    Kind("cloud fails", 2, _fail_cloud, cloud=True),
    Kind("cloud slow", 1, _slow_cloud, cloud=True),
)
