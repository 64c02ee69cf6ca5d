"""From a client's PreprocessedRequest to those that workers get, and from pieces of answers to its outputs. No I/O.

What a worker takes may be less than what a client gives: text and chats become token ids, stop strings stay here, and
choices are asked for one by one where the worker makes one at a time.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from dynamo_frontend import envelope
from dynamo_frontend.catalog import Model
from dynamo_frontend.media import KINDS, check_part
from dynamo_frontend.offers import Offer, Reading, offer_of, reading_of
from dynamo_frontend.parsers.said import Arguments, Call, Reasoning
from dynamo_frontend.pieces import Piece, join
from dynamo_frontend.preprocess import Part, Shown, check_stops, naming, split
from dynamo_frontend.prompts import chat_prompt, check_can_prepare, tokenize
from dynamo_frontend.schemas import Calling, Role, Templated
from dynamo_grpc import InvalidRequestError, UnsupportedError
from dynamo_grpc.messages import chat_turn, from_struct
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_grpc.v1 import model_card_pb2
from dynamo_grpc.validation import check_request, makes_vectors_alone

_ROLES = get_args(Role)
_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


async def prepare_message(request: pb.PreprocessedRequest, model: Model) -> tuple[list[Part], Shown, str]:
    """The requests to send, what of their answers is shown, and the prompt as the template wrote it, if asked for.

    Raises:
        MeshError: the model can't be asked this.
    """
    card, message, formatted = model.card, pb.PreprocessedRequest(), ""
    message.CopyFrom(request)
    _check_types(message, model)
    if message.media and model.media is not None and "media" in card.capabilities:  # else it is refused below
        message.ClearField("media")
        await model.media.check(request.media, card, message.media)
    offer, reading = _offer(message), None
    offer.check(model)
    has_prompt = bool(message.token_ids) + message.HasField("text") + bool(message.messages)
    if card.model_input != model_card_pb2.MODEL_INPUT_TEXT:
        if has_prompt == 1 and not message.token_ids:  # else it is refused below
            formatted, reading = await _to_tokens(message, model, offer)
        shown = _shown(request)
        if shown.has_text:
            check_can_prepare(model)
        message.stop_conditions.ClearField("stop")
        message.stop_conditions.ClearField("include_stop_str_in_output")
        message.output_options.ClearField("text")
    else:
        shown = _shown(request)
        if "stop" not in card.capabilities:
            message.stop_conditions.ClearField("stop")
        if message.messages:
            reading = reading_of(model, offer)
            turns = [_turn(turn, f"messages.{number}") for number, turn in enumerate(message.messages)]
            await _take_media(message, turns, model)
        if not offer.tools:
            message.ClearField("tools")

    def finish(one: pb.PreprocessedRequest) -> None:
        check_request(one, card)
        one.model, one.mdc_sum = card.name, card.checksum
        if not one.eos_token_ids:
            one.eos_token_ids.extend(card.eos_token_ids)

    return split(message, model, finish, reading=reading), shown, formatted


def _offer(message: pb.PreprocessedRequest) -> Offer:
    """The tools that a request offers."""
    if not message.HasField("tools"):
        return Offer()
    if not message.messages:
        raise InvalidRequestError("tools are for chats: give messages", param="tools")
    try:
        return offer_of(Calling.model_validate(from_struct(message.tools)))
    except ValidationError as error:
        raise envelope.to_mesh_error(error)[0] from None


def _check_types(message: pb.PreprocessedRequest, model: Model) -> None:
    if message.messages:
        model.check_type(model_card_pb2.MODEL_TYPE_CHAT, "chats")
    elif message.HasField("text"):
        model.check_type(model_card_pb2.MODEL_TYPE_COMPLETIONS, "completions of a text")
    elif makes_vectors_alone(model.card):
        raise UnsupportedError(f"model {model.card.name!r} makes embeddings alone: call Embed", param="model")


def _shown(request: pb.PreprocessedRequest) -> Shown:
    stop, options = request.stop_conditions, request.output_options
    check_stops(stop.stop)
    has_text = bool(stop.stop or request.messages) or request.HasField("text")
    return Shown(
        list(stop.stop),
        stop.include_stop_str_in_output,
        options.skip_special_tokens if options.HasField("skip_special_tokens") else True,
        options.text or bool(stop.stop) if options.HasField("text") else has_text,
    )


async def _to_tokens(message: pb.PreprocessedRequest, model: Model, offer: Offer) -> tuple[str, Reading | None]:
    """Put the prompt's token ids in place of its text or chat; gives what the template wrote, if that is asked for, and
    how the answer is read.
    """
    check_can_prepare(model)
    formatted, reading = "", None
    if message.HasField("text"):
        if not message.text:
            raise InvalidRequestError("the prompt is empty", param="text")
        with naming("text"):
            token_ids = await tokenize(model, message.text, add_special_tokens=True)
    else:
        turns = [_turn(turn, f"messages.{number}") for number, turn in enumerate(message.messages)]
        await _take_media(message, turns, model)
        with naming("messages"):
            prompt = await chat_prompt(model, turns, Templated(), offer)
        token_ids = prompt.token_ids
        if message.output_options.formatted_prompt:
            formatted = prompt.text
        is_forced = offer.constrain(message, model)
        reading = reading_of(model, offer, is_forced=is_forced, is_thinking=prompt.is_thinking)
        message.ClearField("tools")
    message.ClearField("text")
    message.ClearField("messages")
    message.token_ids.extend(token_ids)
    return formatted, reading


def _turn(message: pb.ChatMessage, where: str) -> dict[str, Any]:
    """One turn as chat templates know it."""
    if message.role not in _ROLES:
        text = f"the role {message.role!r} is none of {', '.join(_ROLES)}"
        raise InvalidRequestError(text, param=f"{where}.role")
    for number, part in enumerate(message.content):
        if part.WhichOneof("part") is None:
            raise InvalidRequestError("the part has nothing in it", param=f"{where}.content.{number}")
    if not message.content and not message.tool_calls:
        raise InvalidRequestError("the message has no content", param=f"{where}.content")
    turn = chat_turn(message)
    parts = turn.get("content")
    for number, part in enumerate(parts if isinstance(parts, list) else ()):
        if part["type"] != "text":
            check_part(part, f"{where}.content.{number}")
    return turn


async def _take_media(message: pb.PreprocessedRequest, turns: list[dict[str, Any]], model: Model) -> None:
    """Put the media of a chat into a message; data that stands there leaves the chat."""
    if model.media is None:
        return
    has_own = bool(message.media)
    if not await model.media.take(turns, model.card, message.media):
        return
    if has_own:
        raise InvalidRequestError("give pictures in messages or in media, not in both", param="media")
    for turn in message.messages:
        for part in turn.content:
            kind = part.WhichOneof("part")
            if kind in KINDS and getattr(part, kind).url[:5].lower() == "data:":
                getattr(part, kind).url = ""


class Outputs:
    """The outputs of one answer, made from its pieces: what waits while one is written goes with the next.

    Args:
        num_choices: that the answer has.
        has_text: the client sees text beside the token ids.

    Attributes:
        sequence: of the next one.
    """

    def __init__(self, num_choices: int, *, has_text: bool, formatted: str = "") -> None:
        self._num_left, self._has_text = num_choices, has_text
        self._waiting: list[Piece] = []
        self._more = pb.GenerateResponse()
        if formatted:
            self._more.annotations["formatted_prompt"] = formatted
        self.sequence = 0

    def add(self, pieces: list[Piece]) -> bool:
        """Keep pieces; False asks for a rest, in which they are written. The last ones wait for the usage."""
        self._waiting += pieces
        self._num_left -= sum(piece.finish is not None for piece in pieces)
        return self._num_left <= 0

    def add_more(self, output: pb.GenerateResponse) -> None:
        """Keep what an output of a worker says beside its choices: who answers, say."""
        if output.HasField("prompt_info"):
            self._more.prompt_info.CopyFrom(output.prompt_info)
        if output.HasField("worker"):
            self._more.worker.CopyFrom(output.worker)
        if output.HasField("annotations"):
            self._more.annotations.MergeFrom(output.annotations)

    @property
    def has_some(self) -> bool:
        """Whether there is something to send."""
        return bool(self._waiting)

    def take(self, usage: pb.Usage | None = None) -> pb.GenerateResponse:
        """The next one: all that waits; the last one has the usage."""
        pieces, self._waiting = self._waiting, []
        response, self._more = self._more, pb.GenerateResponse()
        response.sequence = self.sequence
        self.sequence += 1
        if usage is not None:
            response.usage.CopyFrom(usage)
        for piece in pieces if len(pieces) == 1 else join(pieces):
            delta = response.choices.add(index=piece.index, token_ids=piece.token_ids)
            if piece.text and (self._has_text or not piece.token_ids):
                delta.text = piece.text
            _say(delta, piece)
            if piece.logprobs is not None:
                delta.logprobs.CopyFrom(piece.logprobs)
            if piece.finish is not None:
                delta.finish.CopyFrom(_finish_of(piece))
        return response


def _say(delta: pb.ChoiceDelta, piece: Piece) -> None:
    """What a piece says beside its text."""
    for one in piece.said:
        match one:
            case Reasoning(text):
                delta.reasoning += text
            case Call(index, call_id, name):
                delta.tool_calls.add(index=index, id=call_id, name=name)
            case Arguments(index, text):
                call = next((call for call in delta.tool_calls if call.index == index), None)
                call = delta.tool_calls.add(index=index) if call is None else call
                call.arguments += text


def _finish_of(piece: Piece) -> pb.FinishInfo:
    if piece.stop is not None:
        return pb.FinishInfo(reason=pb.FINISH_REASON_STOP, stop_string=piece.stop)
    if piece.info is not None and piece.finish != "tool_calls":
        return piece.info
    return pb.FinishInfo(reason=_REASONS.get(piece.finish or "", pb.FINISH_REASON_STOP))
