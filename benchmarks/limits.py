"""Measure what must not happen: growth, and one request that costs others: `python benchmarks/limits.py [NAME …]`."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import signal
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import uvloop
from dynamo_frontend.app import Frontend
from dynamo_frontend.figures import read_metrics
from dynamo_frontend.settings import FrontendSettings
from load import Client, Load, Seen, body, connect, percentile_ms
from systems import Ours, cpu_s, rss_bytes

from dynamo_grpc import Context, ModelInput
from dynamo_grpc.cards import load_model
from dynamo_grpc.names import EndpointName
from dynamo_grpc.testing import Mesh

_PICTURES = Path(__file__).resolve().parent.parent / "examples" / "pictures" / "worker.py"
_SENTENCE = "Tell me something about the sea and its many creatures. "


async def idle_streams(count: int = 1000) -> None:
    """Memory of streams that are open and silent."""
    with running(Ours(0.0, "Holder")) as ours:
        clients = [await connect(ours.address) for _ in range(count)]
        for client in clients[:10]:
            client.send(body(3))
            await client.first
        before = [rss_bytes(pid) for pid in ours.pids]
        for client in clients[10:]:
            client.send(body(3))
        await asyncio.gather(*(client.first for client in clients))
        frontend, worker = ((rss_bytes(p) - b) / (count - 10) / 1e3 for p, b in zip(ours.pids, before, strict=True))
        print(f"an idle stream: {frontend:.1f} kB in the frontend, {worker:.1f} kB in the worker ({count} streams)")


async def growth(count: int = 100_000) -> None:
    """Memory after many requests."""
    with running(Ours(0.0)) as ours:
        clients = [await connect(ours.address) for _ in range(64)]
        asked, marks = 0, []

        async def ask(client: object, until: int) -> None:
            nonlocal asked
            while asked < until:
                asked += 1
                await client.ask(body(2))  # type: ignore[attr-defined]

        for until in (count // 10, count // 2, count):
            await asyncio.gather(*(ask(client, until) for client in clients))
            marks.append([rss_bytes(pid) / 2**20 for pid in ours.pids])
        told = ", ".join(f"{frontend:.1f} + {worker:.1f}" for frontend, worker in marks)
        print(f"memory in MiB after {count // 10:,}, {count // 2:,} and {count:,} requests: {told}")


async def request(count: int = 3000) -> None:
    """What a request costs the frontend, all in all, and how long it is on its way from HTTP to its handler: one after
    the other, and 16 at once; prompts of about 500 tokens, each another one, and the same again (cached tokens).
    """
    with running(Ours(0.0, "Stamper")) as ours:
        for side_by_side, prompts in ((1, count), (16, count), (16, 1)):
            clients = [await connect(ours.address) for _ in range(side_by_side)]
            numbers, sent = iter(range(count)), {}

            async def ask(client: object) -> None:
                for number in numbers:  # noqa: B023 - awaited within the round
                    name = f"request-{side_by_side}-{prompts}-{number}"  # noqa: B023
                    content = body(1, f"{side_by_side} {number % prompts} " + _SENTENCE * 38)  # noqa: B023
                    sent[name] = time.monotonic()  # noqa: B023
                    await client.ask(content, name)  # type: ignore[attr-defined]

            before = [cpu_s(pid) for pid in ours.pids]
            await asyncio.gather(*map(ask, clients))
            used = [(cpu_s(pid) - b) / count * 1e3 for pid, b in zip(ours.pids, before, strict=True)]
            await asyncio.sleep(0.5)
            rows = [line.split() for line in ours.lines if line.startswith("began ")]
            took = [float(row[2]) - sent[row[1]] for row in rows if row[1] in sent]
            print(
                f"a request ({rows[-1][3]} tokens, {side_by_side} at a time, {prompts} prompts): "
                f"{used[0]:.2f} ms CPU in the frontend, {used[1]:.2f} in the worker; from HTTP to its handler "
                f"p50 {percentile_ms(took, 50):.2f} ms, p99 {percentile_ms(took, 99):.2f} ms ({len(took)} of {count})"
            )


async def cancel(streams: int = 256, count: int = 200) -> None:
    """From a client's leaving to the end of its handler, beside paced streams."""
    with running(Ours(0.02, "Holder")) as ours:
        load = asyncio.ensure_future(Load(ours.address, streams, 100, spread_s=2.0).run(2.0, 30.0, lambda: None))
        await asyncio.sleep(4.0)
        left = {}
        for number in range(count):
            client = await connect(ours.address)
            client.send(body(1000), f"cancel-{number}")
            await client.first
            await asyncio.sleep(0.05)
            left[f"cancel-{number}"] = time.monotonic()
            client.transport.abort()
        await asyncio.sleep(1.0)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        ended = {line.split()[1]: float(line.split()[2]) for line in ours.lines if line.startswith("ended cancel-")}
        took = [ended[name] - at for name, at in left.items()]
        print(
            f"client's end to handler's end beside {streams} streams: p50 {percentile_ms(took, 50):.1f} ms, "
            f"p99 {percentile_ms(took, 99):.1f} ms ({len(took)} of {count})"
        )


async def cancel_through_a_proxy(count: int = 300) -> None:
    """The cancellation demo: from a client's kill or leaving to the handler's end, directly and through a proxy."""
    ended: asyncio.Future[float]

    async def engine(request: object) -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
                await asyncio.sleep(0.01)
        finally:
            ended.set_result(time.monotonic())

    async with Mesh() as mesh:
        await mesh.serve("demo.server.generate", engine)
        behind = await mesh.client("demo.server.generate")

        async def proxy(request: object) -> AsyncIterator[object]:
            async for item in await behind.generate(request):
                yield item.data()

        await mesh.serve("demo.middle.generate", proxy)
        for name, client in (("directly", behind), ("through a proxy", await mesh.client("demo.middle.generate"))):
            took = []
            for number in range(count):
                ended, context = asyncio.get_running_loop().create_future(), Context()
                async with await client.generate(None, context=context) as stream:
                    for _ in range(3):
                        await anext(stream)
                    at = time.monotonic()
                    if number % 2:
                        context.kill()
                took.append(await ended - at)
            print(
                f"a client's kill or leaving to the handler's end, {name}: p50 {percentile_ms(took, 50):.1f} ms, "
                f"p99 {percentile_ms(took, 99):.1f} ms"
            )


async def disturbed(name: str, content: bytes, seconds: float = 12.0, beside: str | Path = "") -> None:
    """The others' time between tokens, without and with a large request."""
    with running(Ours(0.02, beside=beside)) as ours:
        url = f"http://{ours.address}/v1/chat/completions"
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            seen: list[Seen] = []
            for is_disturbed in (False, True):
                process = None
                if is_disturbed:  # in a process of its own, so that the loop that measures goes on
                    command = (
                        f"while :; do curl -s -o /dev/null --data-binary @{file.name} -H Expect: {url}; sleep 1; done"
                    )
                    process = await asyncio.create_subprocess_shell(command, start_new_session=True)
                found, _ = await Load(ours.address, 64, 100, spread_s=2.0).run(2.0, seconds, lambda: None)
                seen.append(found)
                if process:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
        figures = "; ".join(
            f"{what}: p50 {percentile_ms(s.gaps, 50):.1f}, p99 {percentile_ms(s.gaps, 99):.1f}, "
            f"longest {max(s.gaps) * 1e3:.0f} ms"
            for what, s in zip(("alone", "with it"), seen, strict=True)
        )
        print(f"{name} ({len(content) / 1e6:.1f} MB, again and again) among 64 streams, between tokens {figures}")


def picture_body() -> bytes:
    """A chat with a picture of 10 MB, for the example's worker."""
    pixels = random.Random(1).randbytes(3 * 1850 * 1850)
    image = b"P6 1850 1850 255\n" + pixels  # PPM: nothing to compress, and Pillow reads it
    url = f"data:image/x-portable-pixmap;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "pictures", "messages": [{"role": "user", "content": parts}]}).encode()


async def embeddings(seconds: float = 6.0) -> None:
    """Texts a second of the worker `minilm`, whose weights must be installed: alone, and batched."""
    text = "The quick brown fox jumps over the lazy dog and runs along the river until the sun goes down."
    with running(Ours(0.02, beside="minilm")) as ours:
        async with httpx.AsyncClient(base_url=f"http://{ours.address}", timeout=60) as client:
            for streams, texts in ((1, 1), (8, 1), (32, 1), (1, 64)):
                took: list[float] = []
                started = time.perf_counter()

                async def ask(texts: int = texts, took: list[float] = took, started: float = started) -> None:
                    while time.perf_counter() - started < seconds:
                        at = time.perf_counter()
                        content = {"model": "all-minilm-l6-v2", "input": [text] * texts}
                        (await client.post("/v1/embeddings", json=content)).raise_for_status()
                        took.append(time.perf_counter() - at)

                await asyncio.gather(*(ask() for _ in range(streams)))
                rate = len(took) * texts / (time.perf_counter() - started)
                print(
                    f"embeddings, {streams} at a time of {texts} texts: {rate:.0f} texts/s, "
                    f"p50 {percentile_ms(took, 50):.0f} ms"
                )


async def figures(streams: int = 64, requests: int = 20) -> None:
    """What the metrics say of a load, beside what its clients counted."""
    with running(Ours(0.01)) as ours:

        def told() -> dict[str, float]:
            with urllib.request.urlopen(f"http://{ours.address}/metrics") as answer:
                samples = read_metrics(answer.read().decode())
            return {name: value for (name, labels), value in samples.items() if "le" not in dict(labels)}

        clients, seen, before = [await connect(ours.address) for _ in range(streams)], Seen(), told()

        async def ask(client: Client, number: int) -> None:
            await asyncio.sleep(number / streams)
            client.seen = seen
            for _ in range(requests):
                await client.ask(body(100))

        await asyncio.gather(*map(ask, clients, range(streams)))
        await asyncio.sleep(0.2)
        now = told()

        def of(name: str) -> float:
            return now[f"dynamo_frontend_{name}"] - before.get(f"dynamo_frontend_{name}", 0.0)

        for what, counted, measured in (
            ("requests", len(seen.totals), of("request_duration_seconds_count")),
            ("tokens", 100 * len(seen.totals), of("output_tokens_total")),
            ("gaps between tokens", 99 * len(seen.totals), of("inter_token_latency_seconds_count")),
            ("mean TTFT in ms", 1e3 * sum(seen.ttft) / len(seen.ttft), 1e3 * _mean(of, "time_to_first_token_seconds")),
            ("mean time of a request in ms", 1e3 * sum(seen.totals) / len(seen.totals),
             1e3 * _mean(of, "request_duration_seconds")),
        ):  # fmt: skip
            print(f"{what}: clients {counted:.1f}, metrics {measured:.1f} ({(measured / counted - 1) * 100:+.1f} %)")


def _mean(of: Callable[[str], float], name: str) -> float:
    return of(f"{name}_sum") / of(f"{name}_count")


async def many_models(count: int = 1_000, requests: int = 20_000) -> None:
    """Series and memory of a frontend that is asked for many models, with all of their workers in one process."""

    async def handler(request: object) -> AsyncIterator[str]:
        yield "word"

    async with Mesh() as mesh, asyncio.TaskGroup() as tasks:
        runtime = mesh.runtime()
        for number in range(count):
            name = EndpointName(f"ns{number}", "backend", "generate")
            runtime.set_model(name, load_model(None, f"model-{number}", model_input=ModelInput.Text))
            tasks.create_task(runtime.serve(name, handler))
        frontend = Frontend(FrontendSettings(), mesh.runtime)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(frontend), base_url="http://x")
        async with frontend._lifespan(frontend.app), http:
            while len(frontend.catalog.ready()) < count:
                await asyncio.sleep(0.1)
            marks = []
            for number in range(requests):
                body = {"model": f"model-{number % count}", "messages": [{"role": "user", "content": "x"}]}
                answer = await http.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                if (number + 1) % (requests // 4) == 0:
                    marks.append(f"{rss_bytes(os.getpid()) / 2**20:.0f}")
            started = time.perf_counter()
            text = (await http.get("/metrics")).text
            took_s = time.perf_counter() - started
            series = sum(1 for line in text.splitlines() if not line.startswith("#"))
            print(
                f"{count} models, {requests} requests: {', '.join(marks)} MiB after each quarter, for workers and "
                f"frontend; {series} series, {len(text) / 1e6:.1f} MB in {took_s:.1f} s"
            )
        runtime.shutdown()


async def idle_delivery(seconds: float = 300.0) -> None:
    """A mesh without requests: what it costs, and that the next request is as fast as the last."""
    with running(Ours(0.0)) as ours:
        client = await connect(ours.address)
        for _ in range(20):
            await client.ask(body(10))
        before = [cpu_s(pid) for pid in ours.pids]
        await asyncio.sleep(seconds)
        used = [(cpu_s(pid) - b) / seconds * 1e3 for pid, b in zip(ours.pids, before, strict=True)]
        client = await connect(ours.address)
        client.seen = Seen()
        await client.ask(body(10))
        print(
            f"idle for {seconds:.0f} s: {used[0]:.2f} + {used[1]:.2f} ms CPU a second; "
            f"the first token then after {client.seen.ttft[0] * 1e3:.1f} ms"
        )


@contextlib.contextmanager
def running(ours: Ours):  # type: ignore[no-untyped-def]
    """Stop it at the end."""
    try:
        yield ours
    finally:
        ours.stop()


MEASUREMENTS: dict[str, Callable[[], Awaitable[None]]] = {
    "idle-streams": idle_streams,
    "request": request,
    "cancel": cancel,
    "cancel-proxy": cancel_through_a_proxy,
    "long-prompt": lambda: disturbed("a prompt of 60 000 tokens", body(5, _SENTENCE * 4000)),
    "large-request": lambda: disturbed("a request of 40 MB", body(5, _SENTENCE * 714_000)),
    "picture": lambda: disturbed("a picture of 10 MB", picture_body(), beside=_PICTURES),
    "embeddings": embeddings,
    "growth": growth,
    "figures": figures,
    "many-models": many_models,
    "idle-delivery": idle_delivery,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(MEASUREMENTS)}; default all")
    for name in parser.parse_args().names or MEASUREMENTS:
        uvloop.run(MEASUREMENTS[name]())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
