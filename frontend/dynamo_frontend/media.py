"""Pictures, videos and sounds in chats: what a client may send, and what a worker is given: URLs, or bytes."""

from __future__ import annotations

import asyncio
import binascii
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pybase64

from dynamo_grpc import InvalidRequestError, TooLargeError, UnsupportedError
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_grpc.v1 import model_card_pb2

if TYPE_CHECKING:
    from dynamo_frontend.fetching import Fetcher

#: Parts of a message that are no text: what they are called in templates and in media types, and to workers.
KINDS = {
    "image_url": ("image", pb.MEDIA_KIND_IMAGE),
    "video_url": ("video", pb.MEDIA_KIND_VIDEO),
    "audio_url": ("audio", pb.MEDIA_KIND_AUDIO),
}
_DATA = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)?((?:;[a-z0-9-]+=[^;,]*)*);base64,", re.IGNORECASE | re.ASCII)
_HTTP = re.compile(r"https?://", re.IGNORECASE | re.ASCII)
#: Characters in which a data URL has said what it is: looking further takes seconds.
_MAX_PREFIX = 1024
#: Others get their turns for so long between two steps of milliseconds.
_TURNS_S = 0.001


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What one request may have.

    Attributes:
        max_total_bytes: of all together; they go to the worker in one message, which has 64 MiB.
        hosts: that may be asked for media, with wildcards; empty means all with public addresses.
    """

    max_items: int = 16
    max_bytes: int = 32 * 1024 * 1024
    max_total_bytes: int = 48 * 1024 * 1024
    hosts: Sequence[str] = ()
    timeout_s: float = 10.0


class Items(Protocol):
    """Where media go: a repeated field."""

    def add(self, *, kind: pb.MediaKind, url: str = ..., data: bytes = ..., mime_type: str = ...) -> object:
        """A new one."""

    def append(self, item: pb.MediaItem) -> None:
        """A copy of one."""


class Found(NamedTuple):
    """A part of a chat that is no text, and its place in the request."""

    part: dict[str, Any]
    where: str

    @property
    def url(self) -> str:
        """Where it is, or the data itself."""
        return str(self.part[self.part["type"]]["url"])


class Media:
    """Makes media items of parts."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits

    async def take(self, turns: Sequence[dict[str, Any]], card: model_card_pb2.ModelCard, items: Items) -> bool:
        """Add the media of a chat, in order. Data goes out of the chat: templates would write it into the prompt.

        Returns:
            Whether there are any.

        Raises:
            UnsupportedError: the worker takes none.
            InvalidRequestError: one can't be had, or is none of its kind; names its place.
        """
        found = list(_found(turns))
        if not found:
            return False
        _check_taken(found[0], card)
        if len(found) > self._limits.max_items:
            text = f"the chat has {len(found)} pictures, videos and sounds: at most {self._limits.max_items}"
            raise InvalidRequestError(text, param=found[self._limits.max_items].where)
        wants_bytes = "media_bytes" in card.capabilities
        takes_text = card.model_input == model_card_pb2.MODEL_INPUT_TEXT
        left = self._limits.max_total_bytes
        for one in found:
            is_data = one.url[:5].lower() == "data:"
            if takes_text and not wants_bytes:
                _check_url(one)  # it stands in the message
                continue
            left -= await self._add(one, items, min(left, self._limits.max_bytes), wants_bytes=wants_bytes)
            if is_data:
                one.part[one.part["type"]] = {**one.part[one.part["type"]], "url": ""}
        return True

    @functools.cached_property
    def _fetcher(self) -> Fetcher:
        from dynamo_frontend.fetching import Fetcher  # who is asked for bytes needs a client, and nobody else

        return Fetcher(self._limits.hosts, self._limits.max_bytes, self._limits.timeout_s)

    async def _add(self, found: Found, items: Items, limit: int, *, wants_bytes: bool) -> int:
        """Add an item; gives its bytes. They are large: copied once, and others get their turns around it."""
        _check_url(found)
        name, kind = KINDS[found.part["type"]]
        if match := _data(found.url):
            data, mime = self._decoded(found, match.end(), limit), (match[1] or "").lower()
        elif wants_bytes:
            try:
                data, mime = await self._fetcher.fetch(found.url, limit)
            except InvalidRequestError as error:
                raise InvalidRequestError(error.message, param=f"{found.where}.{found.part['type']}.url") from error
        else:
            items.add(kind=kind, url=found.url)
            return 0
        if not data:
            raise InvalidRequestError(f"the {name} is empty", param=found.where)
        if mime and mime != "application/octet-stream" and not mime.startswith(f"{name}/"):
            raise InvalidRequestError(f"what is there is {mime}, no {name}", param=found.where)
        await asyncio.sleep(_TURNS_S)
        items.add(kind=kind, data=data, mime_type=mime)
        await asyncio.sleep(_TURNS_S)
        return len(data)

    def _decoded(self, found: Found, start: int, limit: int) -> bytes:
        """The bytes of a data URL."""
        url = found.url
        if (len(url) - start) * 3 // 4 > limit + 2:
            allowed = (
                f"{self._limits.max_bytes / 2**20:.3g} MiB, and {self._limits.max_total_bytes / 2**20:.3g} MiB in all"
            )
            raise TooLargeError(f"the data has more bytes than may be: {allowed}", param=found.where)
        try:
            return pybase64.b64decode(url[start:], validate=True)
        except binascii.Error as error:
            raise InvalidRequestError(f"the data is no base64: {error}", param=found.where) from None

    async def check(self, given: Sequence[pb.MediaItem], card: model_card_pb2.ModelCard, items: Items) -> None:
        """Add the media that a client gives by itself, held to the same.

        Raises:
            InvalidRequestError, UnsupportedError, TooLargeError: as `take`.
        """
        names = {kind: part for part, (_, kind) in KINDS.items()}
        if len(given) > self._limits.max_items:
            raise InvalidRequestError(f"{len(given)} media items: at most {self._limits.max_items}", param="media")
        left = self._limits.max_total_bytes
        for number, item in enumerate(given):
            where, part = f"media.{number}", names.get(item.kind)
            if part is None:
                raise InvalidRequestError("the item has no kind", param=f"{where}.kind")
            if item.WhichOneof("source") != "url":
                name = KINDS[part][0]
                if not item.data or (item.mime_type and not item.mime_type.startswith(f"{name}/")):
                    raise InvalidRequestError(f"the item has no {name}", param=where)
                if len(item.data) > min(left, self._limits.max_bytes):
                    raise TooLargeError("the item has more bytes than may be", param=where)
                items.append(item)
                left -= len(item.data)
            else:
                found = Found({"type": part, part: {"url": item.url}}, where)
                wants_bytes = "media_bytes" in card.capabilities
                left -= await self._add(found, items, min(left, self._limits.max_bytes), wants_bytes=wants_bytes)


def check_media(turns: Sequence[dict[str, Any]], card: model_card_pb2.ModelCard) -> None:
    """Refuse a chat with media where the worker takes none."""
    if found := next(_found(turns), None):
        _check_taken(found, card)


def _check_taken(found: Found, card: model_card_pb2.ModelCard) -> None:
    if "media" not in card.capabilities:
        kind = KINDS[found.part["type"]][0]
        text = f"model {card.name!r} takes no {kind}s: its worker does not declare the capability 'media'"
        raise UnsupportedError(text, param=found.where)


def check_part(part: dict[str, Any], where: str) -> None:
    """Refuse a part that is no text where it isn't what OpenAI's API has.

    Raises:
        UnsupportedError: nobody knows its type.
        InvalidRequestError: it has no URL.
    """
    kind = part["type"]
    if kind == "input_audio":  # OpenAI's own: data alone
        told = part.get("input_audio")
        if not isinstance(told, dict) or not isinstance(told.get("data"), str):
            raise InvalidRequestError("the part has no data", param=f"{where}.input_audio.data")
        part.pop("input_audio")
        part |= {
            "type": "audio_url",
            "audio_url": {"url": f"data:audio/{told.get('format') or 'wav'};base64,{told['data']}"},
        }
        return
    if kind not in KINDS:
        raise UnsupportedError(f"content of type {kind!r} is not supported here", param=where)
    told = part.get(kind)
    if isinstance(told, str):
        told = part[kind] = {"url": told}
    if not isinstance(told, dict) or not isinstance(told.get("url"), str) or not told["url"]:
        raise InvalidRequestError("the part has no url", param=f"{where}.{kind}.url")


def _found(turns: Sequence[dict[str, Any]]) -> Iterator[Found]:
    for number, turn in enumerate(turns):
        content = turn.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] in KINDS:
                yield Found(part, f"messages.{number}.content.{place}")


def _data(url: str) -> re.Match[str] | None:
    """What stands before the data of a data URL."""
    return _DATA.match(url, 0, _MAX_PREFIX)


def _check_url(found: Found) -> None:
    if not _HTTP.match(found.url) and not _data(found.url):
        text = "a url begins with http:// or https://, or is data:TYPE;base64,…"
        raise InvalidRequestError(text, param=f"{found.where}.{found.part['type']}.url")


def for_template(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns as templates know them: their parts are of type image, video and audio."""
    made = []
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, list) and any(part["type"] in KINDS for part in content):
            parts = [{**p, "type": KINDS[p["type"]][0]} if p["type"] in KINDS else p for p in content]
            turn = {**turn, "content": parts}  # noqa: PLW2901
        made.append(turn)
    return made
