"""`polyvox route --score` and `polyvox route fit`: complexity of prompts, and a model of it from the user's own labels.

Nothing here needs a server. A file of labels has a JSON object a line: `prompt`, and `weak` and `strong`, which say
whether the weak and the strong model were right: 1 or 0, or a part of it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, NamedTuple, TypeVar

import click
import msgspec
from msgspec import Meta

from proxy.errors import ConfigError
from proxy.routing import complexity, fitting
from proxy.routing.curves import Curve
from proxy.routing.fitting import Example

FEWEST = 50
Right = Annotated[float, Meta(ge=0, le=1)]


class Prompt(msgspec.Struct):
    """A line of prompts. What else the object has is passed over."""

    prompt: str


Row = TypeVar("Row", bound=Prompt)


class Label(Prompt):
    """A line of labels: who was right on a prompt."""

    weak: Right
    strong: Right


class Target(NamedTuple):
    """Where the threshold shall be: a share of strong calls, or a cost of a call in the mean with what each costs."""

    share: float | None = None
    cost: float | None = None
    prices: tuple[float, float] | None = None

    def resolve(self) -> float:
        """Return the share of strong calls. Raises ConfigError where the target cannot be met."""
        if self.cost is None and self.prices is not None:
            raise ConfigError("--prices: goes with --cost only")
        if self.cost is None:
            return 0.5 if self.share is None else self.share
        if self.share is not None:
            raise ConfigError("--strong-share, --cost: only one of them may be given")
        if self.prices is None:
            raise ConfigError("--cost: needs --prices WEAK STRONG, what a call of each model costs")
        try:
            return fitting.share_for_cost(self.cost, *self.prices)
        except ValueError as e:
            raise ConfigError(f"--{e}") from None


def print_scores(prompts: str, model: Path | None) -> None:
    """Print the complexity of each prompt of a file, `-` for stdin. Raises ConfigError that names the bad line."""
    chosen = complexity.load(model) if model else complexity.shipped()
    name = "stdin" if prompts == "-" else prompts
    with _opened(prompts, name) as file:
        for row in _rows(file, name, Prompt):
            click.echo(f"{chosen.score(row.prompt):.6f}")


def fit(labels: Path, out: Path, target: Target) -> None:
    """Write a model fitted to labels, and report what it is worth. Raises ConfigError where labels are no good."""
    share = target.resolve()
    rows = _read(labels)
    _say(f"reading {len(rows)} prompts")
    examples = [Example(complexity.read(row.prompt), row.strong - row.weak) for row in rows]
    scores = _cross_validated(examples)
    curve = _curve(labels, scores, rows)
    lengths = _curve(labels, [float(len(row.prompt)) for row in rows], rows)
    threshold = fitting.threshold_for_share(scores, share)
    _say("fitting all of them")
    fitted = fitting.fit(examples, complexity.shipped())
    _write(out, msgspec.json.encode(msgspec.structs.replace(fitted, threshold=threshold)) + b"\n")
    _say(f"APGR, cross-validated: {curve.apgr():.3f} (prompt length {lengths.apgr():.3f}, random 0.500)")
    _say(f"half of the gap is closed at {curve.cpt(0.5):.0%} strong calls, 80% of it at {curve.cpt(0.8):.0%}")
    _say(f"threshold for {share:.0%} strong calls: {threshold:.4f}, where {curve.pgr(share):.0%} of the gap is closed")
    _say(f"wrote {out}")


def _cross_validated(examples: list[Example]) -> list[float]:
    rounds = iter(range(1, 6))

    def learn(places: list[int]) -> complexity.Coefficients:
        _say(f"cross-validation, {next(rounds)} of 5")
        return fitting.fit([examples[i] for i in places], complexity.shipped())

    return fitting.out_of_fold([e.reading for e in examples], learn, fitting.shuffled_folds(len(examples)))


def _read(labels: Path) -> list[Label]:
    with _opened(str(labels), str(labels)) as file:
        rows = list(_rows(file, str(labels), Label))
    if len(rows) < FEWEST:
        raise ConfigError(f"{labels}: {len(rows)} labels; at least {FEWEST} are needed, and thousands are better")
    return rows


def _opened(path: str, name: str) -> IO[bytes]:
    try:
        return click.open_file(path, "rb")
    except OSError as e:
        raise ConfigError(f"{name}: {e.strerror}") from None


def _rows(lines: Iterable[bytes], name: str, kind: type[Row]) -> Iterator[Row]:
    decode = msgspec.json.Decoder(kind).decode
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                raise ConfigError(f"{name}, line {number}: {e}") from None


def _curve(labels: Path, scores: list[float], rows: list[Label]) -> Curve:
    try:
        return Curve(scores, [row.weak for row in rows], [row.strong for row in rows])
    except ValueError as e:
        raise ConfigError(f"{labels}: {e}") from None


def _write(out: Path, data: bytes) -> None:
    try:
        out.write_bytes(data)
    except OSError as e:
        raise ConfigError(f"{out}: {e.strerror}") from None


def _say(text: str) -> None:
    """Tell the user how it goes, apart from what is printed as a result."""
    click.echo(text, err=True)
