"""One worker, all rules, one report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

import grpc

from dynamo_grpc.conformance import answers, lifecycle, refusals
from dynamo_grpc.conformance.rule import Broken, NotSeen, Outcome, Report, Rule, Verdict
from dynamo_grpc.conformance.target import Target

#: All rules, in the order in which they are tried.
RULES: tuple[Rule, ...] = tuple(
    sorted((*answers.rules.all, *refusals.rules.all, *lifecycle.rules.all), key=lambda rule: rule.is_last)
)
#: A rule may take so long.
_RULE_S = 60.0


async def judge(
    address: str,
    model: str = "",
    *,
    only: Collection[str] = (),
    drains: bool = False,
    pid: int | None = None,
    tell: Callable[[Verdict], None] = lambda _: None,
) -> Report:
    """Judge the worker at an address.

    Args:
        model: the one to ask for; empty is the first that it describes.
        only: names of rules; none are all.
        drains: also how it leaves: it serves nothing afterwards.
        pid: its process: it is told to leave by SIGTERM, in place of Control.Drain.
        tell: called with each verdict as it is reached.

    Raises:
        Broken: nobody answers, or the model isn't served there.
    """
    target = Target(address, model, pid)
    async with target.channel:
        await target.connect()
        verdicts = []
        for rule in RULES:
            if (only and rule.name not in only) or (rule.is_last and not drains):
                continue
            verdicts.append(await _judge(rule, target))
            tell(verdicts[-1])
    return Report(address, target.model, tuple(verdicts))


async def _judge(rule: Rule, target: Target) -> Verdict:
    started = time.monotonic()
    outcome: Outcome = "passed"
    came = ""
    try:
        if target.makes_vectors_alone and not rule.is_for_vectors:
            raise NotSeen("the model makes vectors alone")
        async with asyncio.timeout(_RULE_S):
            await rule.check(target)
    except Broken as broken:
        outcome, came = "failed", str(broken)
    except NotSeen as why:
        outcome, came = "skipped", str(why)
    except TimeoutError:
        outcome, came = "failed", f"nothing after {_RULE_S:g} s"
    except grpc.aio.AioRpcError as error:
        outcome, came = "failed", f"a call ended with {error.code().name}: {error.details()}"
    except Exception as error:  # what came can't even be read
        outcome, came = "failed", f"{type(error).__name__}: {error}"
    return Verdict(rule.name, rule.wants, outcome, came, time.monotonic() - started)
