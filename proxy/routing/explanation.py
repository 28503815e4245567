"""A plan told: as JSON for people and programs, and as a header of the answer. Pure."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from proxy.routing.features import Features
from proxy.routing.router import Option, Plan

_LONGEST = 4096  # bytes of a header; many clients take no more than 8 KiB of them all


def full(plan: Plan, models: Sequence[str], asked: str) -> dict[str, Any]:
    """Return all of a plan. models: who is asked, in order, those of chains included. asked: the name that was."""
    f = plan.features
    return {
        "asked": asked,
        "model": next(iter(models), None),
        "reason": _reason(plan, models),
        "task": f.task,
        "complexity": None if f.complexity is None else round(f.complexity, 4),
        "level": f.level,
        "prefer": plan.prefer,
        "wanted": plan.wanted,
        "prompt_tokens": round(f.tokens),
        "max_tokens": f.max_tokens,
        "budget_limit": f.budget_limit,
        "requirements": _requirements(f),
        "candidates": [_option(option) for option in plan.options],
        "fallbacks": list(models[1:]),
    }


def header(plan: Plan, models: Sequence[str]) -> bytes:
    """Return a plan as the value of a header: compact JSON in ASCII, without the last candidates if it is too long."""
    f = plan.features
    candidates = [_short(option) for option in plan.options]
    told = {
        "reason": _reason(plan, models),
        "task": f.task,
        "level": f.level,
        "complexity": None if f.complexity is None else round(f.complexity, 4),
        "fallbacks": list(models[1:]),
        "candidates": candidates,
    }
    while len(value := json.dumps(told, separators=(",", ":")).encode()) > _LONGEST and candidates:
        candidates.pop()
    return value


def _reason(plan: Plan, models: Sequence[str]) -> str:
    return f"{plan.reason}, {models[0]} stands in" if models and not plan.models else plan.reason


def _option(option: Option) -> dict[str, Any]:
    usd = None if option.usd is None else float(f"{option.usd:.6g}")
    return {**msgspec.structs.asdict(option), "usd": usd}


def _short(option: Option) -> dict[str, Any]:
    return {name: value for name, value in _option(option).items() if value not in (None, "ready")}


def _requirements(f: Features) -> dict[str, Any]:
    found = {
        "modalities": sorted(f.modalities - {"text"}), "languages": sorted(f.languages), "needs": list(f.needs),
        "region": f.region, "context": f.context, "speed": f.speed, "quality": f.quality,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}
