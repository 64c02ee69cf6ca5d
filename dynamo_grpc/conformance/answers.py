"""Rules about answers: what streams, how it ends, what is counted, what options do."""

from __future__ import annotations

import asyncio

import grpc
from google.rpc import error_details_pb2

from dynamo_grpc.conformance.rule import Broken, NotSeen, Rules
from dynamo_grpc.conformance.target import CALL_S, Seen, Target
from dynamo_grpc.services import fold
from dynamo_grpc.v1 import inference_pb2 as pb

rules = Rules()
#: Streams at once, as the rules about them say.
_NUM_STREAMS = 200


@rules.rule()
async def smallest_request(target: Target) -> None:
    """A prompt and max_tokens are a complete request: all else takes the model's defaults."""
    request = target.prompt(12)
    request.stop_conditions.max_tokens = 4
    seen = (await target.read(request)).need_ok()
    if not (seen.tokens() or seen.text() or seen.finishes()):
        raise Broken("the stream ended with OK and no output")


@rules.rule()
async def empty_options(target: Target) -> None:
    """An empty options message ({}) means the model's defaults, as if it were left out."""
    request = target.prompt(12)
    for name in ("sampling_options", "stop_conditions", "output_options"):
        getattr(request, name).SetInParent()
    request.stop_conditions.max_tokens = 4
    (await target.read(request)).need_ok()


@rules.rule()
async def order(target: Target) -> None:
    """Outputs are numbered 0, 1, 2 …, without a gap or a repeat."""
    numbers = [output.sequence for output in (await target.read(target.ask())).need_ok().outputs]
    if numbers != list(range(len(numbers))):
        raise Broken(f"the outputs had the numbers {_short(numbers)}")


@rules.rule()
async def finish(target: Target) -> None:
    """Each choice ends with one finish that has a reason, and nothing of it comes after."""
    seen = (await target.read(target.ask())).need_ok()
    deltas = [delta for output in seen.outputs for delta in output.choices if delta.index == 0]
    finishes = seen.finishes()
    if len(finishes) != 1:
        raise Broken(f"choice 0 had {len(finishes)} finishes")
    if finishes[0].reason == pb.FINISH_REASON_UNSPECIFIED:
        raise Broken("choice 0 ended without a reason")
    if not deltas[-1].HasField("finish"):
        raise Broken("choice 0 went on after its finish")


@rules.rule()
async def usage(target: Target) -> None:
    """The usage comes once, in the last output."""
    outputs = (await target.read(target.ask())).need_ok().outputs
    places = [number for number, output in enumerate(outputs) if output.HasField("usage")]
    if places != [len(outputs) - 1]:
        raise Broken(f"of {len(outputs)} outputs, those with a usage were {places or 'none'}")


@rules.rule()
async def usage_counts(target: Target) -> None:
    """The usage counts the prompt's tokens and all generated ones."""
    if target.takes_text:
        raise NotSeen("the tokens of a text can't be counted from outside")
    request = target.ask()
    seen = await target.read(request)
    for told in seen.usages[-1:]:
        given, counted = (told.prompt_tokens, told.completion_tokens), (len(request.token_ids), len(seen.tokens()))
        if given != counted:
            raise Broken(f"prompt_tokens, completion_tokens were {given}; sent and received were {counted}")


@rules.rule()
async def worker_once(target: Target) -> None:
    """Who answers is told in the first output alone, if at all."""
    outputs = (await target.read(target.ask())).need_ok().outputs
    if late := [output.sequence for output in outputs[1:] if output.HasField("worker")]:
        raise Broken(f"outputs {_short(late)} told it too")


@rules.rule()
async def vocabulary(target: Target) -> None:
    """Generated token ids are of the model's vocabulary."""
    if not target.card.vocab_size:
        raise NotSeen("the card says no vocab_size")
    if wrong := [t for t in (await target.read(target.ask())).need_ok().tokens() if t >= target.card.vocab_size]:
        raise Broken(f"token id {wrong[0]} came, and vocab_size is {target.card.vocab_size}")


@rules.rule()
async def max_tokens(target: Target) -> None:
    """At most max_tokens tokens are generated, and FINISH_REASON_LENGTH says that they were."""
    for limit in (1, 5):
        seen = (await target.read(target.ask(limit))).need_ok()
        if (num := len(seen.tokens())) > limit:
            raise Broken(f"{num} tokens came for max_tokens = {limit}")
        reasons = [finish.reason for finish in seen.finishes()]
        if num == limit and reasons and reasons[0] == pb.FINISH_REASON_STOP and not _has_stopped(seen):
            raise Broken(f"max_tokens = {limit} was reached, and the reason was FINISH_REASON_STOP")


def _has_stopped(seen: Seen) -> bool:
    """Whether its end has a cause beside max_tokens, or may have."""
    return any(finish.WhichOneof("stop") for finish in seen.finishes())


@rules.rule()
async def temperature_zero(target: Target) -> None:
    """Temperature 0 is a value, not unset: it always takes the most likely token."""
    request = target.ask(16)
    request.sampling_options.ClearField("seed")
    await _same(target, request, request, "temperature 0")


@rules.rule()
async def seed(target: Target) -> None:
    """Equal seeds give equal answers."""
    request = target.ask(16)
    request.sampling_options.temperature = 1.0
    await _same(target, request, request, "one seed")


async def _same(target: Target, one: pb.PreprocessedRequest, other: pb.PreprocessedRequest, what: str) -> None:
    first, second = (await target.read(one)).need_ok(), (await target.read(other)).need_ok()
    if (first.tokens(), first.text()) != (second.tokens(), second.text()):
        shown = [seen.tokens()[:8] or seen.text()[:40] for seen in (first, second)]
        raise Broken(f"two requests with {what} were answered {shown[0]} and {shown[1]}")


@rules.rule()
async def stop_token_ids(target: Target) -> None:
    """stop_token_ids end the answer and are shown; stop_token_ids_hidden are not."""
    if target.takes_text:
        raise NotSeen("it generates text")
    tokens = (await target.read(target.ask(12))).tokens()
    at = next((i for i, token in enumerate(tokens) if 1 <= i < len(tokens) - 1 and token not in tokens[:i]), None)
    if at is None:
        raise NotSeen("its answers have no token that could be a stop in the middle")
    for field, expected in (("stop_token_ids", tokens[: at + 1]), ("stop_token_ids_hidden", tokens[:at])):
        request = target.ask(12)
        getattr(request.stop_conditions, field).append(tokens[at])
        seen = await target.read(request)
        if seen.tokens() != expected:
            raise Broken(f"{field} = [{tokens[at]}] gave {seen.tokens()}; without it the answer is {tokens}")
        if len(ends := seen.finishes()) == 1 and ends[0].reason != pb.FINISH_REASON_STOP:
            raise Broken(f"{field} ended the answer, and its reason was not FINISH_REASON_STOP")


@rules.rule()
async def min_tokens(target: Target) -> None:
    """No stop id counts before min_tokens tokens."""
    if target.takes_text:
        raise NotSeen("it generates text")
    tokens = (await target.read(target.ask(12))).tokens()
    if len(tokens) < 6:
        raise NotSeen(f"it ends after {len(tokens)} tokens")
    request = target.ask(12)
    request.stop_conditions.stop_token_ids.append(tokens[1])
    request.stop_conditions.min_tokens = 5
    if len(came := (await target.read(request)).tokens()) < 5:
        raise Broken(f"min_tokens = 5 and a stop id that comes second gave {len(came)} tokens")


@rules.rule()
async def resume(target: Target) -> None:
    """An answer that began elsewhere goes on: resume says where the prompt ends, usage counts it whole."""
    if target.takes_text:
        raise NotSeen("answers in text can't go on elsewhere")
    whole = target.ask(12)
    tokens = (await target.read(whole)).tokens()
    if len(tokens) < 6:
        raise NotSeen(f"it ends after {len(tokens)} tokens")
    request = target.ask(12 - 4)
    request.token_ids.extend(tokens[:4])
    request.resume.num_prompt_tokens = len(whole.token_ids)
    request.resume.num_attempts = 1
    seen = await target.read(request)
    if seen.code is not grpc.StatusCode.OK or seen.tokens() != tokens[4:]:
        came = seen.tokens() if seen.code is grpc.StatusCode.OK else seen.status
        raise Broken(f"the whole answer is {tokens}; after its first 4 tokens came {came}, not the rest")
    for told in seen.usages[-1:]:
        if (told.prompt_tokens, told.completion_tokens) != (len(whole.token_ids), len(tokens)):
            raise Broken(
                f"its usage was {told.prompt_tokens} + {told.completion_tokens}, and that of the whole answer is "
                f"{len(whole.token_ids)} + {len(tokens)}"
            )


@rules.rule()
async def choices(target: Target) -> None:
    """N choices come if the card has the capability n, each with its index and its finish."""
    if "n" not in target.card.capabilities:
        raise NotSeen("the card has no capability n")
    request = target.ask()
    request.sampling_options.n = 3
    seen = (await target.read(request)).need_ok()
    indices = {delta.index for output in seen.outputs for delta in output.choices}
    ended = [index for index in range(3) if len(seen.finishes(index)) == 1]
    if indices != {0, 1, 2} or len(ended) != 3:
        raise Broken(f"n = 3 gave the choices {sorted(indices)}, of which {ended} ended once")


@rules.rule()
async def logprobs(target: Target) -> None:
    """Logprobs has an entry for each token, and as many alternatives as were asked for."""
    if "logprobs" not in target.card.capabilities:
        raise NotSeen("the card has no capability logprobs")
    request = target.ask()
    request.output_options.logprobs = 2
    for output in (await target.read(request)).need_ok().outputs:
        for delta in output.choices:
            counts = len(delta.token_ids), len(delta.logprobs.token_logprobs), len(delta.logprobs.top)
            if len(set(counts)) != 1:
                raise Broken("a delta had {} tokens, {} logprobs and {} tops".format(*counts))
            if any(len(top.token_ids) != 2 or len(top.logprobs) != 2 for top in delta.logprobs.top):
                raise Broken("2 alternatives were asked for, and another number came")


@rules.rule()
async def unicode(target: Target) -> None:
    """A prompt in any script is taken, and text is whole characters."""
    if not target.takes_text:
        raise NotSeen("it takes token ids")
    request = target.ask()
    request.text = "grüße, 你好, здравствуй, 🙂👩‍👩‍👧"
    seen = (await target.read(request)).need_ok()
    if "\ufffd" in seen.text():
        raise Broken(f"the text has broken characters: {seen.text()[:60]!r}")


@rules.rule()
async def large_prompt(target: Target) -> None:
    """A prompt that fits into the context is taken, however large its message."""
    context = target.card.context_length
    size = min(context - 16 if context else 2_000, 100_000)
    request = target.ask(4, max(1, size if not target.takes_text else size // 4))
    (await target.read(request)).need_ok()


@rules.rule()
async def once(target: Target) -> None:
    """GenerateOnce is Generate folded into one answer, where it is implemented."""
    request = target.ask()
    try:
        answer = await target.inference.GenerateOnce(request, timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NotSeen("it is not implemented") from None
        raise Broken(f"GenerateOnce ended with {error.code().name}: {error.details()}") from None
    folded = pb.GenerateResponse()
    for output in (await target.read(request)).outputs:
        fold(folded, output)
    if (one := _said(answer)) != (other := _said(folded)):
        raise Broken(f"GenerateOnce gave {one}, the stream {other}")


def _said(response: pb.GenerateResponse) -> list[tuple[int, list[int], str, int]]:
    return [(c.index, list(c.token_ids), c.text, c.finish.reason) for c in response.choices]


@rules.rule()
async def many_streams(target: Target) -> None:
    """200 streams at once are each answered whole, or refused with RESOURCE_EXHAUSTED."""
    alone = await target.read(target.ask())
    for number, seen in enumerate(await _flood(target)):
        if seen.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            continue
        if seen.code is not grpc.StatusCode.OK:
            raise Broken(f"stream {number} ended with {seen.status}")
        if (seen.tokens(), seen.text()) != (alone.tokens(), alone.text()):
            came = seen.tokens()[:8] or seen.text()[:40]
            raise Broken(f"stream {number} gave {came}; the same request alone gave {alone.tokens()[:8]}")


@rules.rule()
async def overload(target: Target) -> None:
    """A full worker refuses with RESOURCE_EXHAUSTED, and its RetryInfo says when to come back."""
    refused = [s for s in await _flood(target) if s.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    if not refused:
        raise NotSeen(f"it took {_NUM_STREAMS} requests at once")
    for seen in refused:
        seen.need(grpc.StatusCode.RESOURCE_EXHAUSTED, "a request without room", "OVERLOADED")
        retry = seen.detail(error_details_pb2.RetryInfo())
        if retry is None or retry.retry_delay.ToMilliseconds() <= 0:
            raise Broken(f"it refused with {seen.status}, and no retry_delay")
        if seen.outputs:
            raise Broken("it refused a request that it had begun to answer")


async def _flood(target: Target) -> list[Seen]:
    if not target.flooded:
        target.flooded = await asyncio.gather(*(target.read(target.ask()) for _ in range(_NUM_STREAMS)))
    return target.flooded


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (" …" if len(numbers) > 12 else "")
