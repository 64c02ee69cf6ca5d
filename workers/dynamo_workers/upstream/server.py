"""The other server: its models, its metrics, and requests to it, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import openai
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dynamo_grpc import (
    Context,
    DeadlineError,
    DistributedRuntime,
    EngineShutdown,
    HttpError,
    InvalidRequestError,
    MeshError,
    ModelInput,
    ModelType,
    OverloadedError,
    register_model,
)
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_workers.upstream.bodies import body_of
from dynamo_workers.upstream.settings import Settings

logger = logging.getLogger(__name__)

_REASONS = {
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
}
#: A server may be silent for so long where a request has no deadline; frontends have limits of their own.
_LONGEST_S = 3600.0
#: The deadline's cancel comes first, alone: one that comes while httpcore cleans up after its own timeout leaves the
#: connection open, and the other server at work.
_LATE_S = 5.0
_ASK_S = 10.0
#: Before it is asked again, and twice as long each time.
_PAUSE_S = 0.2
_MAX_METRICS = 4 * 1024 * 1024


class Server:
    """Use it with `async with`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = _Latest()
        self._registry = CollectorRegistry()
        self._registry.register(self._metrics)
        self._has_metrics = bool(settings.metrics_url)
        self._http: httpx.AsyncClient
        self._client: openai.AsyncOpenAI

    async def __aenter__(self) -> Server:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(_ASK_S, connect=5.0))
        self._client = openai.AsyncOpenAI(
            base_url=self._settings.base_url,
            api_key=self._settings.current_key(),
            http_client=self._http,
            max_retries=0,  # it would also ask again where it was told to come back later
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """The names of its models now."""
        self._client.api_key = self._settings.current_key()
        page = await self._client.with_options(timeout=_ASK_S).models.list()
        return [model.id async for model in page]

    async def serve(self, runtime: DistributedRuntime, model: str) -> None:
        """Serve one of its models, until cancelled or shut down."""
        endpoint = runtime.namespace("dynamo").component("upstream").endpoint(endpoint_name(model))
        kinds = ModelType.Chat | ModelType.Completions
        able = ("n", "stop", "tools", "guided_decoding", "media")
        await register_model(ModelInput.Text, kinds, endpoint, None, model, capabilities=able)
        if self._has_metrics:
            endpoint.metrics.attach(self._registry)

        async def generate(request: pb.PreprocessedRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
            try:
                async for output in self._generate(request, context, model):
                    yield output
            except openai.OpenAIError as error:
                raise told_of(error, self._settings.base_url) from error
            except MeshError:
                raise
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise _unreadable(self._settings.base_url, error) from error

        await runtime.serve(endpoint.name, generate, gives_dicts=False)

    async def _generate(
        self, request: pb.PreprocessedRequest, context: Context, model: str
    ) -> AsyncIterator[pb.GenerateResponse]:
        """A request's outputs. Leaving closes the connection: that is how the other server learns of it."""
        silence_s = (context.remaining_s() or _LONGEST_S) + _LATE_S
        client = self._client.with_options(timeout=httpx.Timeout(silence_s, connect=5.0))
        headers = {"x-request-id": context.id()}
        body = body_of(request, model)
        create = client.completions.create if request.HasField("text") else client.chat.completions.create
        finished: set[int] = set()
        async with await self._open(lambda: create(**body, extra_headers=headers)) as chunks:
            async for chunk in chunks:
                if context.is_stopped():
                    return
                output = output_of(chunk)
                finished |= {choice.index for choice in output.choices if choice.HasField("finish")}
                if output.choices or output.HasField("usage"):
                    yield output
        if len(finished) < max(1, request.sampling_options.n):
            raise EngineShutdown(f"the server at {self._settings.base_url} ended in the middle of an answer")

    async def _open(self, create: Callable[[], Awaitable[Any]]) -> Any:
        """Ask, again while the server can't be reached."""
        for attempt in range(self._settings.num_retries):
            try:
                return await create()
            except openai.APITimeoutError:
                raise
            except openai.APIConnectionError:
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        return await create()

    async def is_of_the_mesh(self, instance_id: int) -> bool:
        """Whether the server is a frontend of the very mesh that this instance is in."""
        try:
            health = await self._http.get(self._settings.base_url.removesuffix("/v1") + "/health")
            instances = health.json().get("instances", ())
            return any(one.get("instance_id") == f"{instance_id:016x}" for one in instances)
        except (httpx.HTTPError, ValueError, AttributeError, TypeError):
            return False  # others have no such thing

    async def ask_metrics(self) -> None:
        """Take what the server's metrics are now; one that has none isn't asked again."""
        if not self._has_metrics:
            return
        try:
            answer = await self._http.get(self._settings.metrics_url, headers={"accept": "text/plain"})
            if answer.status_code in (404, 405):
                self._has_metrics = False
                return
            text = answer.raise_for_status().text
            if len(text) > _MAX_METRICS:
                raise ValueError(f"it has more than {_MAX_METRICS} characters")
            self._metrics.families = await asyncio.to_thread(lambda: list(text_string_to_metric_families(text)))
        except (httpx.HTTPError, ValueError) as error:
            self._metrics.families = []
            logger.debug("no metrics at %s: %s", self._settings.metrics_url, error)


class _Latest(Collector):
    """The other server's metrics, as they were when it was asked last."""

    def __init__(self) -> None:
        self.families: list[Metric] = []

    def collect(self) -> Iterator[Metric]:
        yield from self.families

    def describe(self) -> list[Metric]:
        return []


def told_of(error: openai.OpenAIError, base_url: str) -> Exception:
    """An error of the other server, or of the way to it."""
    if isinstance(error, openai.APITimeoutError):
        return DeadlineError(f"the server at {base_url} did not answer in time")
    if isinstance(error, openai.APIConnectionError):
        return EngineShutdown(f"the server at {base_url} can't be reached")  # another worker may reach one
    if not isinstance(error, openai.APIStatusError):
        return _unreadable(base_url, error)
    text, status = _message(error), error.status_code
    if status in (429, 503, 529):
        return OverloadedError(f"the server has no room: {text}", retry_after_s=_retry_after(error))
    if status in (401, 403):
        return HttpError(502, f"the server at {base_url} refuses the worker's key ({status})")
    if status in (400, 404, 413, 422):
        return InvalidRequestError(text, param=_param(error))
    return HttpError(502 if status < 500 else status, f"the server failed ({status}): {text}")


def _unreadable(base_url: str, error: Exception) -> HttpError:
    return HttpError(
        502, f"the server at {base_url} answered what can't be read: {type(error).__name__}: {error}"[:500]
    )


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    told = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    return str(told or error.message)[:1000]


def _param(error: openai.APIStatusError) -> str:
    param = error.body.get("param") if isinstance(error.body, dict) else None
    return param if isinstance(param, str) else ""


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < _LONGEST_S else None


def endpoint_name(model: str) -> str:
    """A name for a model's endpoint: names of models may have other characters, and be longer."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", model).strip("-_")[:48]
    if plain == model:
        return plain
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}".lstrip("-")


def output_of(chunk: Any) -> pb.GenerateResponse:
    """A chunk of a chat or a completion as an output."""
    output = pb.GenerateResponse()
    for choice in chunk.choices or ():
        delta = output.choices.add(index=choice.index)
        if (said := getattr(choice, "delta", None)) is not None:
            _take_delta(delta, said)
        elif text := getattr(choice, "text", None):
            delta.text = text
        if choice.finish_reason:
            delta.finish.reason = _REASONS.get(choice.finish_reason, pb.FINISH_REASON_STOP)
    if (usage := getattr(chunk, "usage", None)) is not None:
        output.usage.prompt_tokens, output.usage.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        for target, where, name in (
            ("cached_tokens", "prompt_tokens_details", "cached_tokens"),
            ("reasoning_tokens", "completion_tokens_details", "reasoning_tokens"),
        ):
            count = getattr(getattr(usage, where, None), name, None)
            if count is not None:
                setattr(output.usage, target, count)
    return output


def _take_delta(delta: pb.ChoiceDelta, said: Any) -> None:
    if text := said.content or getattr(said, "refusal", None):
        delta.text = text
    if reasoning := getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None):
        delta.reasoning = str(reasoning)
    for call in said.tool_calls or ():
        function = call.function
        name = (function and function.name) or ""
        call_id = call.id or (f"call_{secrets.token_hex(12)}" if name else "")
        delta.tool_calls.add(
            index=call.index or 0, id=call_id, name=name, arguments=(function and function.arguments) or ""
        )
