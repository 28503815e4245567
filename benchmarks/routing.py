"""Measure the model of complexity on labelled prompts, beside routing at random and by length. `make bench-routing`

APGR and CPT in RouteLLM's definitions (see `proxy/routing/curves.py`): by 5-fold cross-validation on MMLU, on MMLU
subjects that were left out, and on every data set of which nothing was seen. Writes benchmarks/ROUTING.md; with --ship,
the model that comes with the program too.
"""

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from engines.spec import FleetStatus
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.cost import Price
from proxy.endpoints import Endpoints
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.registry import Group, build
from proxy.routing import complexity, fitting
from proxy.routing.complexity import Coefficients, Reading
from proxy.routing.curves import Curve
from proxy.routing.dispatch import Dispatcher, Inquiry
from proxy.routing.fitting import Example
from proxy.routing.traits import Kind

RESULTS = Path(__file__).parent / "ROUTING.md"
SMALL = ("qwen2.5-7b-instruct", "mistral-7b-instruct-v0.3", "gemma-2-9b-it", "llama-3.1-8b-instruct")
STRONG = "llama-3.1-nemotron-51b-instruct"
WEAK = "mistral-7b-instruct-v0.3"
OTHERS = (*SMALL, STRONG, "llama-3.3-nemotron-super-49b-v1")
SUBJECT_FOLDS = 8
# What counts how much. GPT-4's answers to this subject were rarely recognised (3% right; chance has 25%): it works
# them out in steps. The other data sets are few prompts, but of other forms.
FORM_FAULT, FAULTY_WEIGHT, OTHER_WEIGHT = "high_school_mathematics", 0.3, 2.0
CANDIDATES = 10  # models, in the measurement of the time
MIN_GAP = 0.03  # between the models' accuracies, to call one of them strong


class Prompt(msgspec.Struct):
    """A labelled prompt. gain: of the strong model. difficulty: share of models that fail. target: what is fitted."""

    text: str
    dataset: str
    subject: str
    weak: float
    strong: float
    gain: float
    difficulty: float
    target: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared/data")
    parser.add_argument("--ship", action="store_true", help="write proxy/routing/complexity.json anew")
    parser.add_argument("--quick", action="store_true", help="only cross-validation; write nothing")
    args = parser.parse_args()
    bench = Bench(with_targets(read_mmlu(args.data) + read_nine(args.data)))
    if args.ship:
        complexity.SHIPPED.write_bytes(msgspec.json.encode(bench.learn(range(len(bench.prompts)))) + b"\n")
    sections = [bench.by_cross_validation()]
    if not args.quick:
        sections += [bench.by_subject(), bench.by_dataset(), speed([p.text for p in bench.prompts])]
    report = "\n\n".join(sections)
    print(report)
    if not args.quick:
        RESULTS.write_text(f"{head(bench)}\n\n{report}\n")


def read_mmlu(folder: Path) -> list[Prompt]:
    return [
        Prompt(row["prompt"], "mmlu", row["subject"], row["weak"], row["strong"], row["strong"] - row["weak"], 0.0)
        for row in map(json.loads, (folder / "weak_strong_mmlu.jsonl").open())
    ]


def read_nine(folder: Path) -> list[Prompt]:
    return [
        Prompt(
            row["prompt"],
            f"9 models: {row['dataset']}",
            "",
            row["score"][WEAK],
            row["score"][STRONG],
            row["score"][STRONG] - statistics.fmean(row["score"][name] for name in SMALL),
            1 - statistics.fmean(row["score"][name] for name in OTHERS),
        )
        for row in map(json.loads, (folder / "difficulty_9models.jsonl").open())
    ]


def with_targets(prompts: list[Prompt]) -> list[Prompt]:
    """Set what is to be learned: on MMLU the gain of the strong model.

    Of the nine models the large ones are hardly better, so there it is how hard a prompt is beside others of its data
    set, and what the data set's gain is beside that of all.
    """
    sets = defaultdict(list)
    for p in prompts:
        sets[p.dataset].append(p)
    nine = statistics.fmean(p.gain for p in prompts if p.dataset != "mmlu")
    for name, members in sets.items():
        gain = statistics.fmean(p.gain for p in members)
        hard = statistics.fmean(p.difficulty for p in members)
        for p in members:
            p.target = p.gain - gain if name == "mmlu" else p.difficulty - hard + gain - nine
    return prompts


def _weight(p: Prompt) -> float:
    if p.dataset != "mmlu":
        return OTHER_WEIGHT
    return FAULTY_WEIGHT if p.subject == FORM_FAULT else 1.0


class Bench:
    """Prompts read once, and the measurements over them."""

    def __init__(self, prompts: list[Prompt]) -> None:
        # Nothing changes after this.
        self.prompts = prompts
        self.readings: list[Reading] = [complexity.read(p.text) for p in prompts]
        self.examples = [Example(r, p.target, _weight(p)) for r, p in zip(self.readings, prompts, strict=True)]
        self.mmlu = [i for i, p in enumerate(prompts) if p.dataset == "mmlu"]

    def learn(self, places: Sequence[int]) -> Coefficients:
        return fitting.fit([self.examples[i] for i in places])

    def by_cross_validation(self) -> str:
        """Fit on four fifths of MMLU and all of the rest, and measure on the last fifth, five times."""
        folds = dict(zip(self.mmlu, fitting.shuffled_folds(len(self.mmlu)), strict=True))
        scores = self._scores(folds.get, self.mmlu)
        rows = [self._row("ours", self.mmlu, scores), *self._baselines(self.mmlu)]
        return table("MMLU, 5-fold cross-validation", rows)

    def by_subject(self) -> str:
        """Measure on subjects of MMLU of which nothing was seen."""
        subjects = sorted({self.prompts[i].subject for i in self.mmlu})
        fold = dict(zip(subjects, fitting.shuffled_folds(len(subjects), SUBJECT_FOLDS), strict=True))
        scores = self._scores(lambda i: fold.get(self.prompts[i].subject), self.mmlu)
        rows = [self._row("ours", self.mmlu, scores), *self._baselines(self.mmlu)]
        return table(f"MMLU, subjects left out ({SUBJECT_FOLDS} groups)", rows)

    def by_dataset(self) -> str:
        """Measure on data sets of which nothing was seen."""
        every = range(len(self.prompts))
        scores = self._scores(lambda i: self.prompts[i].dataset, every)
        sets: dict[str, list[int]] = defaultdict(list)
        for i in every:
            sets[self.prompts[i].dataset].append(i)
        nine = [i for i in every if self.prompts[i].dataset != "mmlu"]
        rows = []
        for name, places in {"mmlu": self.mmlu, "9 models, all sets": nine, **sets}.items():
            chosen = [scores[i] for i in places]
            if statistics.fmean(self.prompts[i].strong - self.prompts[i].weak for i in places) >= MIN_GAP:
                rows += [self._row(f"{name}: {way}", places, s) for way, s in [("ours", chosen), self._length(places)]]
        return table("One data set left out", rows)

    def _scores(self, fold: Callable[[int], Hashable], places: Sequence[int]) -> list[float]:
        """Return scores of prompts, each by a model that saw everything but its fold."""
        known, scores = range(len(self.prompts)), {}
        for left_out in {fold(i): None for i in places}:
            model = complexity.Model(self.learn([i for i in known if fold(i) != left_out]))
            scores |= {i: model.score_of(self.readings[i]) for i in places if fold(i) == left_out}
        return [scores[i] for i in places]

    def _length(self, places: Sequence[int]) -> tuple[str, list[float]]:
        return "prompt length", [float(len(self.prompts[i].text)) for i in places]

    def _baselines(self, places: Sequence[int]) -> list[list[str]]:
        name, scores = self._length(places)
        return [self._row(name, places, scores), self._row("random", places, [0.0] * len(places))]

    def _row(self, name: str, places: Sequence[int], scores: Sequence[float]) -> list[str]:
        curve = Curve(scores, [self.prompts[i].weak for i in places], [self.prompts[i].strong for i in places])
        return [name, str(len(places)), f"{curve.apgr():.3f}", f"{curve.cpt(0.5):.0%}", f"{curve.cpt(0.8):.0%}"]


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [f"## {title}", "", "| score | prompts | APGR | CPT(50%) | CPT(80%) |", "|---|---:|---:|---:|---:|", *lines]
    )


def speed(texts: Sequence[str]) -> str:
    """Time the shipped model, and the whole of a decision, on prompts as they are, on this machine."""
    some = texts[:: max(1, len(texts) // 2000)]
    return (
        f"## Time\n\nThe complexity of a prompt takes {_timed(complexity.load().score, some)}; to decide who "
        f"answers it, of {CANDIDATES} models and with the body to be read, {_timed(decider(), some)}. Of three times "
        "the best, since others use the machine too."
    )


def _timed(call: Callable[[str], object], texts: Sequence[str]) -> str:
    cuts = statistics.quantiles([min(_once(call, text) for _ in range(3)) for text in texts], n=100)
    return f"{cuts[49] * 1e6:.0f} us of the processor (median), {cuts[98] * 1e6:.0f} us (99 of 100)"


def _once(call: Callable[[str], object], text: str) -> float:
    began = time.process_time()
    call(text)
    return time.process_time() - began


def decider() -> Callable[[str], object]:
    """Return what routes a prompt as a worker does that has ten models and no traffic yet."""
    endpoint = (EndpointSettings(base_url="http://127.0.0.1:9/v1"),)
    kinds: tuple[Kind, ...] = get_args(Kind)
    config = Config(
        models={
            f"m{i}": ModelSettings(endpoints=endpoint, kind=kinds[i % 3], price=Price(i + 1, 4 * i + 4), context=32768)
            for i in range(CANDIDATES)
        }
    )
    registry = build(config, FleetStatus(version=0))
    dispatcher = Dispatcher(Endpoints(Metrics(config)), config.limits, Prices(config))

    def decide(text: str) -> object:
        body = msgspec.json.encode({"messages": [{"role": "user", "content": text}]})
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        asked = Inquiry("/v1/chat/completions", fields, [], "auto")
        return dispatcher.route(registry, Group("auto", tuple(config.models)), asked)

    return decide


def head(bench: Bench) -> str:
    return (
        "# Routing by complexity\n\n"
        f"Made by `make bench-routing` with Python {platform.python_version()} over {len(bench.prompts)} prompts. "
        "Weak and strong are Mixtral-8x7B and GPT-4-1106 on MMLU, Mistral-7B and Nemotron-51B elsewhere; sets "
        f"on which these differ by less than {MIN_GAP:.0%} are not listed. Random routing has an APGR of 0.5."
    )


if __name__ == "__main__":
    main()
