"""Pictures in chats: through every API to workers, as URLs and as bytes, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from PIL import Image

from dynamo_grpc import Context, ModelInput, ModelType, Worker
from dynamo_grpc.cards import load_model
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2 as pb

from ..conftest import ROOT, eventually
from .front import FOLDER, Front, front_of
from .test_ingress import ask, opened

PATH = ROOT / "examples" / "pictures" / "worker.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("pictures_worker", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Pictures()


def picture(width: int = 3, height: int = 2, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, kind)
    return data.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def chat(*urls: str, model: str = "pictures", **more: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "text", "text": "how large?"}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


async def text_of(front: Front, body: dict[str, Any]) -> str:
    response = await front.post(body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@contextlib.asynccontextmanager
async def serving(mesh: Mesh, worker: Any, **settings: Any) -> AsyncIterator[Front]:
    await mesh.serve_worker(worker)
    async with front_of(mesh, **settings) as front:
        await eventually(lambda: len(front.frontend.catalog.ready()) == 1)
        yield front


class Site:
    """A web server that answers as it is told."""

    def __init__(self, answers: dict[str, tuple[int, dict[str, str], bytes]]) -> None:
        self.answers, self.asked = answers, []
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            self.asked.append(path)
            status, headers, body = self.answers.get(path, (404, {}, b""))
            if status == 0:
                await asyncio.sleep(60)
            lines = [f"HTTP/1.1 {status} X", "connection: close", *(f"{k}: {v}" for k, v in headers.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            await writer.drain()
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://localhost:{self.port}"
        finally:
            server.close()


async def test_through_every_api(mesh: Mesh) -> None:
    import anthropic

    png, jpeg = picture(), picture(640, 480, "JPEG")
    async with serving(mesh, example(), grpc_port=0) as front, opened(front) as client:
        assert (
            await text_of(front, chat(data_url(png), data_url(jpeg, "image/jpeg"))) == "PNG, 3 x 2\nJPEG, 640 x 480\n"
        )
        assert await text_of(front, chat()) == "There is no picture."
        streamed = await front.openai.chat.completions.create(**chat(data_url(png)), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in streamed]) == "PNG, 3 x 2\n"
        part = {"type": "input_image", "image_url": data_url(jpeg, "image/jpeg")}
        content: Any = [{"type": "input_text", "text": "how large?"}, part]
        response = await front.openai.responses.create(model="pictures", input=[{"role": "user", "content": content}])
        assert response.output_text == "JPEG, 640 x 480\n"
        async with anthropic.AsyncAnthropic(base_url=front.url, api_key="x") as claude:
            source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()}
            message = await claude.messages.create(
                model="pictures",
                max_tokens=50,
                messages=[
                    {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}
                ],
            )
            assert message.content[0].text == "PNG, 3 x 2\n"
        turn = pb.ChatMessage(role="user", content=[{"text": {"text": "?"}}, {"image_url": {"url": data_url(png)}}])
        assert (await client.answer(ask(messages=[turn]))).choices[0].text == "PNG, 3 x 2\n"


class Given(Worker):
    """Keeps what it was given."""

    model_path = FOLDER
    model_name = "given"
    capabilities: ClassVar[Any] = ("media",)
    asked: Any = None

    async def generate(self, request: Any, context: Context) -> AsyncIterator[int]:
        type(self).asked = request
        yield 300


class GivenText(Given):
    model_path = None
    model_input = ModelInput.Text
    model_type = ModelType.Chat

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        type(self).asked = request
        yield "x"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}[image]{% elif p.type == 'audio' %}[audio]{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


async def test_workers_of_tokens_have_media_in_order(mesh: Mesh) -> None:
    worker = Given()
    await mesh.serve(
        "own.backend.generate",
        worker.generate,
        load_model(FOLDER, "given", chat_template=TEMPLATE, capabilities=["media"]),
        gives_dicts=False,
    )
    png = picture()
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}}
    body = chat("https://x.example/a.png", data_url(png), model="given", max_tokens=1)
    body["messages"][0]["content"].append(audio)
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        assert (await front.post(body)).status_code == 200
        first, second, third = Given.asked.media
        assert (first.kind, first.url) == (pb.MEDIA_KIND_IMAGE, "https://x.example/a.png")
        assert (second.data, second.mime_type) == (png, "image/png")
        assert (third.kind, third.data, third.mime_type) == (pb.MEDIA_KIND_AUDIO, b"RIFF", "audio/wav")
        tokens = (await front.post({key: body[key] for key in ("model", "messages")}, "/tokenize")).json()["tokens"]
        prompt = (await front.post({"model": "given", "tokens": tokens}, "/detokenize")).json()["prompt"]
        assert prompt == "<user>how large?[image][image][audio]"


async def test_workers_of_messages_have_urls(mesh: Mesh) -> None:
    async with serving(mesh, GivenText()) as front:
        body = chat("https://x.example/a.png", data_url(b"x"), model="given")
        body["messages"][0]["content"][1]["image_url"]["detail"] = "low"
        assert (await front.post(body)).status_code == 200
        _, first, second = GivenText.asked.messages[0].content
        assert (first.image_url.url, first.image_url.detail) == ("https://x.example/a.png", "low")
        assert second.image_url.url == data_url(b"x")
        assert not GivenText.asked.media


async def test_bytes_are_fetched(mesh: Mesh) -> None:
    from dynamo_frontend.media import MediaLimits

    site = Site({
        "/a.png": (200, {"content-type": "image/png"}, picture()),
        "/moved": (302, {"location": "/a.png"}, b""),
        "/inside": (302, {"location": "http://127.0.0.1:1/secret"}, b""),
        "/file": (302, {"location": "file:///etc/passwd"}, b""),
        "/loop": (302, {"location": "/loop"}, b""),
        "/page": (200, {"content-type": "text/html"}, b"<html>"),
        "/long": (200, {"content-type": "image/png", "content-length": "999999999"}, b""),
        "/endless": (200, {"content-type": "image/png"}, b"x" * 300_000),
        "/slow": (0, {}, b""),
    })  # fmt: skip
    limits = MediaLimits(max_items=2, max_bytes=200_000, hosts=("localhost",), timeout_s=0.5)
    async with site.running() as base, serving(mesh, example(), media=limits) as front:
        assert await text_of(front, chat(f"{base}/a.png", f"{base}/moved")) == "PNG, 3 x 2\n" * 2
        for path, said in (
            ("/inside", "127.0.0.1 is none of the hosts"),
            ("/file", "no http:// or https://"),
            ("/loop", "leads on more than 3 times"),
            ("/page", "is text/html, no image"),
            ("/long", "more than 200000 bytes"),
            ("/endless", "more than 200000 bytes"),
            ("/slow", "longer than 0.5 s"),
            ("/none", "it answered 404"),
        ):
            error = await front.error(chat(f"{base}{path}"), 400)
            assert said in error["message"], path
            assert error["param"].startswith("messages.0.content.1")
        error = await front.error(chat(*[f"{base}/a.png"] * 3), 400)
        assert (error["param"], "at most 2" in error["message"]) == ("messages.0.content.3", True)
        error = await front.error(chat(f"http://user:secret@localhost:{site.port}/a.png"), 400)
        assert "no user" in error["message"]
        assert "secret" not in error["message"]
        error = await front.error(chat("http://localhost:1/a.png"), 400)
        assert "localhost gave nothing" in error["message"]
        error = await front.error(chat(data_url(b"x" * 300_000)), 413)
        assert error["param"] == "messages.0.content.1"
        for url in (f"http://localhost:{site.port}/ü", "http://[::1", "http://[not]/", "http://ü.invalid/"):
            error = await front.error(chat(url), 400)
            assert error["param"].startswith("messages.0.content.1")
        assert "/%C3%BC" in site.asked
        error = await front.error(chat("data:image/png;base64,"), 400)
        assert "empty" in error["message"]
        error = await front.error(chat("data:image/png;base64,QQ==QQ=="), 400)
        assert "base64" in error["message"]


def test_addresses_that_lead_inside() -> None:
    from dynamo_frontend.fetching import _is_public

    for address in (
        "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::1", "::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1", "fe80::1%eth0",
        "192.0.0.8", "192.88.99.1", "127.1.2.3", "100.64.0.1", "224.0.0.1", "2002:7f00:1::", "::1", "fd00::1",
    ):  # fmt: skip
        assert not _is_public(address), address
    for address in ("1.1.1.1", "2606:4700::1", "64:ff9b::101:101", "::ffff:1.1.1.1"):
        assert _is_public(address), address


async def test_media_together_have_a_limit(mesh: Mesh) -> None:
    from dynamo_frontend.media import MediaLimits

    site = Site({"/a": (200, {"content-type": "image/png"}, b"x" * 60_000)})
    limits = MediaLimits(max_bytes=100_000, max_total_bytes=150_000, hosts=("localhost",))
    async with site.running() as base, serving(mesh, example(), media=limits) as front:
        error = await front.error(chat(*[f"{base}/a"] * 3), 400)
        assert (error["param"], "more than 30000" in error["message"]) == ("messages.0.content.3.image_url.url", True)
        error = await front.error(chat(data_url(b"x" * 90_000), data_url(b"x" * 90_000)), 413)
        assert error["param"] == "messages.0.content.2"


async def test_media_that_grpc_clients_give(mesh: Mesh) -> None:
    png = picture()
    item: dict[str, Any] = {"kind": pb.MEDIA_KIND_IMAGE, "data": png, "mime_type": "image/png"}
    words = [{"text": {"text": "?"}}]
    async with serving(mesh, example(), grpc_port=0) as front, opened(front) as client:
        turn = pb.ChatMessage(role="user", content=words)
        assert (await client.answer(ask(messages=[turn], media=[item]))).choices[0].text == "PNG, 3 x 2\n"
        for wrong, said, where in (
            ({**item, "data": b"", "url": "file:///etc/passwd"}, "begins with", "media.0.image_url.url"),
            ({**item, "kind": 0}, "no kind", "media.0.kind"),
            ({**item, "mime_type": "text/html"}, "no image", "media.0"),
            ({"kind": pb.MEDIA_KIND_IMAGE}, "no image", "media.0"),
            ({"kind": pb.MEDIA_KIND_IMAGE, "url": "http://127.0.0.1:1/"}, "not public", "media.0.image_url.url"),
        ):
            if "url" in wrong:
                wrong.pop("data", None)
            await client.fails(ask(messages=[turn], media=[wrong]), "INVALID_ARGUMENT", "INVALID_REQUEST", said, where)
        with_part = pb.ChatMessage(role="user", content=[*words, {"image_url": {"url": data_url(png)}}])
        both = ask(messages=[with_part], media=[item])
        await client.fails(both, "INVALID_ARGUMENT", "INVALID_REQUEST", "not in both", "media")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.0.0.1", "[::ffff:127.0.0.1]", "2130706433"],
)
async def test_private_addresses_are_not_asked(mesh: Mesh, host: str) -> None:
    site = Site({"/a.png": (200, {}, picture())})
    async with site.running(), serving(mesh, example()) as front:
        error = await front.error(chat(f"http://{host}:{site.port}/a.png"), 400)
        assert "not public" in error["message"]
        assert not site.asked


WRONG: list[tuple[Any, str, str]] = [
    ({"type": "image_url"}, "messages.0.content.0.image_url.url", "no url"),
    ({"type": "image_url", "image_url": {"url": 5}}, "messages.0.content.0.image_url.url", "no url"),
    ({"type": "image_url", "image_url": {"url": "ftp://x/y"}}, "messages.0.content.0.image_url.url", "begins with"),
    ({"type": "image_url", "image_url": {"url": "http\u017f://x/y"}}, "messages.0.content.0.image_url.url", "begins with"),
    ({"type": "image_url", "image_url": "data:a/a" + ";a=b" * 300_000}, "messages.0.content.0.image_url.url", "begins with"),
    ({"type": "image_url", "image_url": "data:image/png;base64,###"}, "messages.0.content.0", "no base64"),
    ({"type": "image_url", "image_url": {"url": "data:text/html;base64,eHh4"}}, "messages.0.content.0", "text/html, no image"),
    ({"type": "input_audio", "input_audio": {}}, "messages.0.content.0.input_audio.data", "no data"),
    ({"type": "file", "file": {}}, "messages.0.content.0", "'file' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "param", "said"), WRONG)
async def test_wrong_parts(mesh: Mesh, part: Any, param: str, said: str) -> None:
    async with serving(mesh, example()) as front:
        error = await front.error({"model": "pictures", "messages": [{"role": "user", "content": [part]}]}, 400)
        assert (error["param"], said in error["message"]) == (param, True), error


async def test_pictures_that_tools_answer_and_places_in_other_apis(mesh: Mesh) -> None:
    def message(data: bytes) -> dict[str, Any]:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
        result = [{"type": "text", "text": "the screen:"}, {"type": "image", "source": source}]
        return {
            "model": "pictures", "max_tokens": 50, "system": "You see.",
            "messages": [
                {"role": "user", "content": "look"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "see", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": result}]},
            ],
        }  # fmt: skip

    def response(url: str) -> dict[str, Any]:
        output = [{"type": "input_text", "text": "the screen:"}, {"type": "input_image", "image_url": url}]
        return {
            "model": "pictures", "instructions": "You see.",
            "input": [
                {"role": "user", "content": "look"},
                {"type": "function_call", "name": "see", "arguments": "{}", "call_id": "1"},
                {"type": "function_call_output", "call_id": "1", "output": output},
            ],
        }  # fmt: skip

    async with serving(mesh, example()) as front:
        answer = (await front.post(message(picture()), "/v1/messages")).json()
        assert answer["content"][0]["text"] == "PNG, 3 x 2\n"
        answer = (await front.post(response(data_url(picture())), "/v1/responses")).json()
        assert answer["output"][0]["content"][0]["text"] == "PNG, 3 x 2\n"
        nothing = message(picture())
        nothing["messages"][2]["content"][0]["content"] = None
        answer = (await front.post(nothing, "/v1/messages")).json()
        assert answer["content"][0]["text"] == "There is no picture."
        wrong = (await front.post(message(b""), "/v1/messages")).json()
        assert wrong["error"]["message"] == "messages.2.content.0.content.1: the image is empty"
        image = nothing["messages"][0]["content"] = [{"type": "image", "source": {"type": "url", "url": "ftp://x"}}] * 3
        image.insert(0, {"type": "redacted_thinking"})
        wrong = (await front.post({**nothing, "system": None}, "/v1/messages")).json()
        assert wrong["error"]["message"].startswith("messages.0.content.1: a url begins with")
        error = await front.error(response("ftp://x/y"), 400, "/v1/responses")
        assert error["param"] == "input.2.output.1"
        alone = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,#"}]}]
        error = await front.error({"model": "pictures", "input": alone}, 400, "/v1/responses")
        assert (error["param"], "no base64" in error["message"]) == ("input.0.content.0", True)
        alone[0]["content"].append({"type": "input_file", "file_id": "x"})  # type: ignore[attr-defined]
        error = await front.error({"model": "pictures", "input": alone}, 400, "/v1/responses")
        assert error["param"] == "input.0.content.1"


async def test_models_without_eyes(front: Front) -> None:
    error = await front.error(chat(data_url(picture()), model="tiny"), 400)
    assert "takes no images" in error["message"]
    assert error["param"] == "messages.0.content.1"
    source = {"type": "url", "url": "https://x.example/y.png"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
    counted = await front.post(body, "/v1/messages/count_tokens")
    assert (counted.status_code, "takes no images" in counted.json()["error"]["message"]) == (400, True)


@pytest.mark.full
async def test_a_large_picture_comes_through_whole(mesh: Mesh) -> None:
    noise = Image.effect_noise((3200, 3200), 100).convert("RGB")
    data = io.BytesIO()
    noise.save(data, "PNG")
    assert len(data.getvalue()) > 10_000_000
    async with serving(mesh, example()) as front:
        body = json.dumps(chat(data_url(data.getvalue())))
        assert len(body) < 64 * 1024 * 1024
        response = await front.post(body)
        assert response.json()["choices"][0]["message"]["content"] == "PNG, 3200 x 3200\n"
