"""The life of an engine, as decisions: legal moves, restart back-off, hang detection. Pure; time is an argument."""

import signal
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from engines.spec import Restart, State

Command = Literal["load", "unload", "restart"]

MOVES: Final[dict[State, frozenset[State]]] = {
    "stopped": frozenset({"starting"}),
    "starting": frozenset({"ready", "draining", "failed"}),
    "ready": frozenset({"draining", "failed"}),
    "draining": frozenset({"stopped"}),
    "failed": frozenset({"starting", "stopped"}),
}

# Loading what is loaded is allowed and does nothing: several workers may ask for the same model at once.
COMMANDS: Final[dict[Command, frozenset[State]]] = {
    "load": frozenset({"stopped", "failed", "starting", "ready"}),
    "unload": frozenset({"starting", "ready", "failed"}),
    "restart": frozenset({"starting", "ready", "failed"}),
}

# A longer gap between two samples says that we did not look, not that the engine did not work.
_LONGEST_GAP: Final = 5.0


class IllegalMove(Exception):
    """An engine was asked for something that its state does not allow."""


def move(current: State, target: State) -> State:
    """Return `target`; raise IllegalMove where the table has no such move."""
    if target not in MOVES[current]:
        raise IllegalMove(f"an engine cannot go from {current} to {target}")
    return target


def check_command(command: Command, engine: str, state: State) -> None:
    """Raise IllegalMove, in words for a person, where a command makes no sense in this state."""
    if state not in COMMANDS[command]:
        legal = ", ".join(sorted(COMMANDS[command]))
        raise IllegalMove(f"cannot {command} engine {engine} while it is {state}; it must be one of: {legal}")


def next_delay(crash_times: Sequence[float], now: float, restart: Restart) -> float | None:
    """Return the seconds to wait before the next start, or None to give up.

    crash_times: when the engine crashed since it was loaded, the last crash included; same clock as `now`.
    Crashes older than the window are forgiven: they neither count nor lengthen the delay.
    """
    recent = sum(1 for t in crash_times if now - t <= restart.window)
    if recent >= restart.give_up_after:
        return None
    return min(restart.max_delay, restart.first_delay * restart.factor ** max(recent - 1, 0))


def describe_exit(status: int) -> str:
    """Say how an engine ended, from the status that its guard exits with; a negative one is the guard's own end."""
    if status < 0:
        return f"its guard process was ended by {_signal_name(-status)}"
    if status > 128:
        return f"ended by {_signal_name(status - 128)}"
    return f"exited with code {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Sample(msgspec.Struct, frozen=True):
    """One look at a ready engine.

    now: seconds. answered: /health and /metrics answered. in_flight: requests that it runs or queues.
    iterations: any number that changes whenever the engine completes an iteration.
    """

    now: float
    answered: bool
    in_flight: float = 0.0
    iterations: float = 0.0


class HangWatch(msgspec.Struct, frozen=True):
    """What the samples so far say. All figures but `iterations` are seconds.

    silent: how long it has not answered. stuck: how long requests have been in flight since the last
    iteration; idle time in between neither counts nor resets it, since clients give up and come back.
    """

    at: float | None = None
    iterations: float | None = None
    silent: float = 0.0
    stuck: float = 0.0

    def step(self, sample: Sample) -> "HangWatch":
        """Return the watch after one more sample.

        1. It did not answer: silence grows, nothing is learned of its iterations.
        2. It made an iteration since the last look: all is well.
        3. It stands still with requests in flight: it is stuck for longer.
        4. It stands still and has nothing to do: nothing changes.
        """
        gap = 0.0 if self.at is None else min(max(sample.now - self.at, 0.0), _LONGEST_GAP)
        if not sample.answered:  # 1
            return msgspec.structs.replace(self, at=sample.now, silent=self.silent + gap)
        moved = sample.iterations != self.iterations
        stuck = 0.0 if moved else self.stuck + (gap if sample.in_flight > 0 else 0.0)  # 2, 3, 4
        return HangWatch(at=sample.now, iterations=sample.iterations, stuck=stuck)

    def hung(self, timeout: float) -> bool:
        """Whether the engine counts as hung after `timeout` seconds of silence or standing still."""
        return max(self.silent, self.stuck) >= timeout
