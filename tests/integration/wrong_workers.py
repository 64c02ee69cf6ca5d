"""For each rule of the conformance kit, a worker that breaks just that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from dynamo_grpc.cards import checksum
from dynamo_grpc.v1 import control_pb2, inference_pb2

from .conformance_workers import RightText, RightVectors, Wrong

OK, FULL = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED


def changed(**hooks: Any) -> type[Wrong]:
    """A wrong worker from what it does differently."""
    return type("Changed", (Wrong,), hooks)


def lets_pass(**needed: Any) -> type[Wrong]:
    """One that ignores what a request asks for: fields are cleared, or set to something harmless."""

    def request(self: Wrong, request: Any) -> Any:
        for path, value in needed.items():
            message, (*folders, name) = request, path.split("__")
            for folder in folders:
                message = getattr(message, folder)
            if value is None:
                message.ClearField(name)
            elif value[0](getattr(message, name)):
                value[1](message)
        return request

    return changed(request=request)


def wrong_code(wanted: str, given: grpc.StatusCode) -> type[Wrong]:
    """One whose errors have another code where the right one would be `wanted`, and the same details."""

    def error(self: Wrong, code: Any, details: Any, request: Any) -> Any:
        info = error_details_pb2.ErrorInfo()
        is_meant = any(detail.Unpack(info) for detail in details.details) and info.reason == wanted
        return given if is_meant else code, details

    return changed(error=error)


def change_outputs(change: Any) -> type[Wrong]:
    return changed(outputs=lambda self, outputs, request: change(outputs))


def swap_last(outputs: list[Any]) -> list[Any]:
    if len(outputs) > 2:
        outputs[1].sequence, outputs[2].sequence = outputs[2].sequence, outputs[1].sequence
    return outputs


def finish_twice(outputs: list[Any]) -> list[Any]:
    if len(outputs) > 1 and len(outputs[-1].choices) == 1:
        outputs[-2].choices[0].finish.CopyFrom(outputs[-1].choices[0].finish)
    return outputs


def usage_twice(outputs: list[Any]) -> list[Any]:
    if len(outputs) > 1:
        outputs[0].usage.CopyFrom(outputs[-1].usage)
    return outputs


def count_wrong(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    if len(outputs) == 8 and not request.HasField("resume"):
        outputs[-1].usage.completion_tokens += 1
    return outputs


def name_again(outputs: list[Any]) -> list[Any]:
    for output in outputs[1:]:
        output.worker.instance_id = 7
    return outputs


def outside(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    """Ids that the model hasn't; not for all, or rules that compare answers would see it too."""
    self.num += request.stop_conditions.max_tokens == 8
    for output in outputs if self.num <= 6 and request.stop_conditions.max_tokens == 8 else ():
        for delta in output.choices:
            delta.token_ids[:] = [token + 5_000 for token in delta.token_ids]
    return outputs


def more_tokens(self: Wrong, request: Any) -> Any:
    if request.stop_conditions.max_tokens == 5:
        request.stop_conditions.max_tokens = 6
    return request


def no_temperature(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    """Temperature 0 without a seed counts as unset: another answer each time."""
    if not request.sampling_options.HasField("seed") and outputs and outputs[0].sequence == 0:
        self.num += 1
        outputs[0].choices[0].token_ids[0] = self.num
    return outputs


def no_seed(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    if request.sampling_options.temperature == 1.0 and outputs and outputs[0].sequence == 0:
        self.num += 1
        outputs[0].choices[0].token_ids[0] = self.num
    return outputs


def shows_hidden(self: Wrong, request: Any) -> Any:
    stop = request.stop_conditions
    stop.stop_token_ids.extend(stop.stop_token_ids_hidden)
    stop.ClearField("stop_token_ids_hidden")
    return request


def begins_again(self: Wrong, request: Any) -> Any:
    """A resumed request is taken for one with a longer prompt."""
    request.ClearField("resume")
    return request


def one_choice(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    for output in outputs:
        kept = [delta for delta in output.choices if delta.index != 2]
        del output.choices[:]
        output.choices.extend(kept)
    return outputs


def one_top(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    for output in outputs:
        for delta in output.choices:
            for top in delta.logprobs.top:
                del top.token_ids[1:]
                del top.logprobs[1:]
    return outputs


def breaks_characters(self: Wrong, outputs: list[Any], request: Any) -> list[Any]:
    for output in outputs:
        for delta in output.choices:
            delta.text = delta.text.replace("🙂", "\ufffd\ufffd")
    return outputs


async def half_once(self: Wrong, request: Any, context: Any) -> Any:
    answer = await self._once(self.inference.GenerateOnce(request), context, request)
    del answer.choices[0].token_ids[4:]
    return answer


def no_retry(self: Wrong, code: Any, details: Any, request: Any) -> Any:
    if code is FULL:
        kept = [detail for detail in details.details if not detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
        del details.details[:]
        details.details.extend(kept)
    return code, details


class MixesStreamsUp(Wrong):
    """What one stream gets comes of another, when there are many."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.num_inside = 0

    async def Generate(self, request: Any, context: Any) -> Any:
        self.num_inside += 1
        try:
            async for output in super().Generate(request, context):
                if self.num_inside > 20 and output.sequence == 3:
                    output.choices[0].token_ids[:] = [9]
                yield output
        finally:
            self.num_inside -= 1


class LosesFiles(Wrong):
    async def GetFile(self, request: Any, context: Any) -> Any:
        async for piece in super().GetFile(request, context):
            yield control_pb2.GetFileResponse(data=piece.data[:-1])


class KnowsAllServices(Wrong):
    async def Check(self, request: Any, context: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class WatchesOnce(Wrong):
    async def Watch(self, request: Any, context: Any) -> Any:
        async for status in super().Watch(request, context):
            yield status
            return


class GoesOn(Wrong):
    """What a call began goes on after its cancel, or after its deadline."""

    def goes_on_after(self, *, is_late: bool) -> bool:
        return is_late == self.after_deadlines


class GoesOnAfterDeadlines(GoesOn):
    after_deadlines = True


class TakesSmallPromptsOnly(Wrong):
    async def Generate(self, request: Any, context: Any) -> Any:
        if 5_000 < len(request.token_ids) < 8_190:
            await context.abort(FULL, "too large")
        async for output in super().Generate(request, context):
            yield output


class CountsNothing(Wrong):
    async def Describe(self, request: Any, context: Any) -> Any:
        response = await super().Describe(request, context)
        response.num_requests = 0
        return response


class StopsNothing(Wrong):
    async def Stop(self, request: Any, context: Any) -> Any:
        return control_pb2.StopResponse(found=False)


class DeliversTwice(Wrong):
    def frame(self, frame: Any) -> Iterable[Any]:
        return [frame, frame]


class ServesOn(Wrong):
    """It never stops to take requests."""

    async def Drain(self, request: Any, context: Any) -> Any:
        return control_pb2.DrainResponse()


class OneVector(Wrong):
    base = RightVectors

    async def Embed(self, request: Any, context: Any) -> Any:
        answer = await super().Embed(request, context)
        del answer.embeddings[1:]
        return answer


class EmbedsNothing(Wrong):
    base = RightVectors

    async def Embed(self, request: Any, context: Any) -> Any:
        if not request.inputs:
            return inference_pb2.EmbedResponse()
        return await super().Embed(request, context)


def is_there(value: Any) -> bool:
    return bool(value)


def needs_sampling_options(self: Wrong, request: Any) -> Any:
    if not request.HasField("sampling_options"):
        request.sampling_options.temperature = -1
    return request


def takes_empty_for_zero(self: Wrong, request: Any) -> Any:
    if request.HasField("sampling_options") and not request.sampling_options.ListFields():
        request.sampling_options.top_p = 0
    return request


def other_domain(self: Wrong, code: Any, details: Any, request: Any) -> Any:
    for detail in details.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            info.domain = "example.com"
            detail.Pack(info)
    return code, details


class DescribesBadly(Wrong):
    """A card without types, or with a checksum that isn't its own."""

    def change(self, card: Any) -> None:
        card.ClearField("model_types")
        card.checksum = checksum(card)

    async def Describe(self, request: Any, context: Any) -> Any:
        response = await super().Describe(request, context)
        self.right = response.cards[0].checksum
        self.change(response.cards[0])
        self.given = response.cards[0].checksum
        return response

    def request(self, request: Any) -> Any:
        if request.mdc_sum == self.given:
            request.mdc_sum = self.right
        return request


class SaysAnotherChecksum(DescribesBadly):
    def change(self, card: Any) -> None:
        card.checksum = "0" * 15 + "1"


WRONG: dict[str, Any] = {
    "smallest-request": changed(request=needs_sampling_options),
    "empty-options": changed(request=takes_empty_for_zero),
    "order": change_outputs(swap_last),
    "finish": change_outputs(finish_twice),
    "usage": change_outputs(usage_twice),
    "usage-counts": changed(outputs=count_wrong),
    "worker-once": change_outputs(name_again),
    "vocabulary": changed(outputs=outside),
    "max-tokens": changed(request=more_tokens),
    "temperature-zero": changed(outputs=no_temperature),
    "seed": changed(outputs=no_seed),
    "stop-token-ids": changed(request=shows_hidden),
    "min-tokens": lets_pass(stop_conditions__min_tokens=None),
    "resume": changed(request=begins_again),
    "choices": changed(outputs=one_choice),
    "logprobs": changed(outputs=one_top),
    "unicode": changed(outputs=breaks_characters, base=RightText),
    "large-prompt": TakesSmallPromptsOnly,
    "once": changed(GenerateOnce=half_once),
    "many-streams": MixesStreamsUp,
    "overload": changed(error=no_retry),
    "empty-prompt": changed(request=lambda self, r: (r.token_ids or r.HasField("text") or r.token_ids.append(5), r)[1]),
    "one-prompt": lets_pass(text=(is_there, lambda r: r.ClearField("text") if r.token_ids else None)),
    "kind-of-prompt": lets_pass(
        text=(is_there, lambda r: (r.ClearField("text"), r.token_ids.extend([5])) if not r.token_ids else None)
    ),
    "zero-is-a-value": lets_pass(stop_conditions__max_tokens=(lambda v: v == 0, lambda m: setattr(m, "max_tokens", 8))),
    "ranges": lets_pass(sampling_options__temperature=(lambda v: v < 0, lambda m: m.ClearField("temperature"))),
    "token-range": lets_pass(token_ids=(is_there, lambda r: r.token_ids.remove(1867) if 1867 in r.token_ids else None)),
    "context-length": wrong_code("CONTEXT_LENGTH_EXCEEDED", FULL),
    "unknown-model": wrong_code("MODEL_NOT_FOUND", grpc.StatusCode.UNIMPLEMENTED),
    "card": lets_pass(mdc_sum=None),
    "capabilities": lets_pass(lora_name=None),
    "details": changed(error=other_domain),
    "describe": DescribesBadly,
    "card-checksum": SaysAnotherChecksum,
    "files": LosesFiles,
    "health": KnowsAllServices,
    "health-watch": WatchesOnce,
    "load": CountsNothing,
    "cancel": GoesOn,
    "deadline": GoesOnAfterDeadlines,
    "stop": StopsNothing,
    "delivery": DeliversTwice,
    "drain": ServesOn,
    "embed": OneVector,
    "embed-nothing": EmbedsNothing,
}
