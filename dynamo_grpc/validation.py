"""What a PreprocessedRequest must be, checked before it runs: pure, and the same in frontend and worker."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynamo_grpc.errors import CardMismatchError, ContextLengthError, InvalidRequestError, UnsupportedError
from dynamo_grpc.v1 import inference_pb2, model_card_pb2

#: Of one prompt.
MAX_CHOICES = 128
#: Allowed ranges of sampling options, both ends included; the third value excludes the lower end.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "n": (1, MAX_CHOICES, False),
    "best_of": (1, MAX_CHOICES, False),
    "temperature": (0, 100, False),
    "top_p": (0, 1, True),
    "top_k": (-1, 2**31 - 1, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0, 100, True),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
}
_MAX_LOGPROBS = 20
#: What a worker that takes token ids can't do.
_DETOKENIZING = {
    "stop": "stop strings are for whoever detokenizes, ask the frontend",
    "text": "text is for whoever detokenizes, ask the frontend",
}
#: Of one request for vectors, as OpenAI has it.
MAX_INPUTS = 2048


def check_request(request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard) -> None:
    """Refuse a request that the model of `card` can't run.

    Raises:
        InvalidRequestError: a value out of its range; `param` names the field.
        ContextLengthError: the prompt leaves no room for an answer.
        UnsupportedError: the worker doesn't declare an ability that the request needs.
        CardMismatchError: the request was prepared for another card.
    """
    _check_card(request.mdc_sum if request.HasField("mdc_sum") else None, card)
    _check_prompt(request, card)
    _check_sampling(request.sampling_options, card)
    _check_stop(request.stop_conditions)
    _check_capabilities(request, card)


def makes_vectors_alone(card: model_card_pb2.ModelCard) -> bool:
    """Whether a model is for embeddings and nothing else."""
    return list(card.model_types) == [model_card_pb2.MODEL_TYPE_EMBEDDING]


def check_embed(request: inference_pb2.EmbedRequest, card: model_card_pb2.ModelCard) -> None:
    """Refuse a request for vectors that the model of `card` can't make.

    Raises:
        InvalidRequestError, ContextLengthError, UnsupportedError, CardMismatchError: as `check_request`.
    """
    _check_card(request.mdc_sum if request.HasField("mdc_sum") else None, card)
    if not request.inputs:
        raise InvalidRequestError("there is nothing to embed: give inputs", param="inputs")
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidRequestError(f"{len(request.inputs)} inputs: at most {MAX_INPUTS}", param="inputs")
    takes_text = card.model_input == model_card_pb2.MODEL_INPUT_TEXT
    takes, other = ("text", "token_ids") if takes_text else ("token_ids", "text")
    for number, one in enumerate(request.inputs):
        where = f"inputs.{number}"
        if one.token_ids and one.HasField("text"):
            raise InvalidRequestError("give text or token_ids, not both", param=where)
        if one.HasField("text") != takes_text and (one.HasField("text") or one.token_ids):
            raise UnsupportedError(f"model {card.name!r} takes {takes}, not {other}", param=where)
        if not (one.text or one.token_ids):
            raise InvalidRequestError(f"the input is empty: give {takes}", param=where)
        _check_vocabulary(one.token_ids, card, where)
        if card.context_length and len(one.token_ids) > card.context_length:
            text = f"the input has {len(one.token_ids)} tokens, {card.name!r} reads {card.context_length}: shorten it"
            raise ContextLengthError(text, param=where)
    if request.HasField("dimensions"):
        if not request.dimensions:
            raise InvalidRequestError("dimensions is 0: it must be at least 1", param="dimensions")
        check_capability("dimensions", "dimensions", card)


def _check_prompt(request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard) -> None:
    given = [
        name
        for name, is_given in (
            ("token_ids", bool(request.token_ids)),
            ("text", request.HasField("text")),
            ("messages", bool(request.messages)),
        )
        if is_given
    ]
    takes_text = card.model_input == model_card_pb2.MODEL_INPUT_TEXT
    takes = "text or messages" if takes_text else "token_ids"
    if not given or (request.HasField("text") and not request.text):
        raise InvalidRequestError(f"the prompt is empty: give {takes}", param=given[0] if given else "token_ids")
    if len(given) > 1:
        raise InvalidRequestError(f"give one prompt, not {' and '.join(given)}", param=given[1])
    if takes_text == (given[0] == "token_ids"):
        raise UnsupportedError(f"model {card.name!r} takes {takes}, not {given[0]}", param=given[0])
    if takes_text:
        return
    _check_vocabulary(request.token_ids, card, "token_ids")
    if request.HasField("resume") and not 0 < request.resume.num_prompt_tokens <= len(request.token_ids):
        raise InvalidRequestError("resume.num_prompt_tokens must be within token_ids", param="resume")
    check_length(len(request.token_ids), card)


def _check_card(wanted: str | None, card: model_card_pb2.ModelCard) -> None:
    if wanted is not None and wanted != card.checksum:
        raise CardMismatchError(
            f"the request was prepared with model card {wanted}, this worker serves {card.checksum}"
        )


def _check_vocabulary(token_ids: Sequence[int], card: model_card_pb2.ModelCard, param: str) -> None:
    if card.vocab_size and token_ids and (largest := max(token_ids)) >= card.vocab_size:
        raise InvalidRequestError(
            f"token id {largest} is outside the vocabulary of {card.name!r}: ids go from 0 to {card.vocab_size - 1}",
            param=param,
        )


def check_length(num_prompt_tokens: int, card: model_card_pb2.ModelCard) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if card.context_length and num_prompt_tokens >= card.context_length:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, and the context of {card.name!r} holds {card.context_length} "
            "with the answer: shorten the prompt",
            param="token_ids",
        )


def _check_sampling(options: inference_pb2.SamplingOptions, card: model_card_pb2.ModelCard) -> None:
    for field, value in options.ListFields():
        if field.name in _RANGES:
            low, high, excludes_low = _RANGES[field.name]
            if not (low < value <= high if excludes_low else low <= value <= high):
                edge = "above" if excludes_low else "at least"
                raise InvalidRequestError(
                    f"{field.name} is {value:g}: it must be {edge} {low:g} and at most {high:g}", param=field.name
                )
    for token_id, bias in options.logit_bias.items():
        if not -100 <= bias <= 100:
            raise InvalidRequestError(f"logit_bias is {bias:g}: it must be from -100 to 100", param="logit_bias")
        if card.vocab_size and token_id >= card.vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token id {token_id}, outside the vocabulary of {card.vocab_size}", param="logit_bias"
            )
    if options.HasField("length_penalty") and not math.isfinite(options.length_penalty):
        raise InvalidRequestError("length_penalty must be finite", param="length_penalty")
    if options.HasField("best_of") and options.best_of < options.n:
        raise InvalidRequestError(f"best_of is {options.best_of}, less than n = {options.n}", param="best_of")


def _check_stop(stop: inference_pb2.StopConditions) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        raise InvalidRequestError("max_tokens is 0: it must be at least 1", param="max_tokens")
    if stop.HasField("max_tokens") and stop.min_tokens > stop.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {stop.min_tokens}, more than max_tokens = {stop.max_tokens}", param="min_tokens"
        )
    if any(not text for text in stop.stop):
        raise InvalidRequestError("a stop string is empty", param="stop")


def _check_capabilities(request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard) -> None:
    options, output = request.sampling_options, request.output_options
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(output, name) > _MAX_LOGPROBS:
            raise InvalidRequestError(f"{name} is {getattr(output, name)}: at most {_MAX_LOGPROBS}", param=name)
    needed = (
        ("n", "sampling_options.n", options.n > 1),
        ("best_of", "sampling_options.best_of", options.best_of > max(1, options.n)),
        ("beam_search", "sampling_options.use_beam_search", options.use_beam_search),
        ("logprobs", "output_options.logprobs", output.HasField("logprobs")),
        ("prompt_logprobs", "output_options.prompt_logprobs", output.HasField("prompt_logprobs")),
        ("guided_decoding", "guided_decoding", request.HasField("guided_decoding")),
        ("lora", "lora_name", bool(request.lora_name)),
        ("media", "media", bool(request.media) or _has_media(request)),
        ("stop", "stop_conditions.stop", bool(request.stop_conditions.stop)),
        ("text", "output_options.text", output.text and card.model_input != model_card_pb2.MODEL_INPUT_TEXT),
    )
    for capability, field, is_needed in needed:
        if is_needed:
            check_capability(capability, field, card)


def _has_media(request: inference_pb2.PreprocessedRequest) -> bool:
    return any(part.WhichOneof("part") not in ("text", None) for turn in request.messages for part in turn.content)


def check_capability(capability: str, field: str, card: model_card_pb2.ModelCard) -> None:
    """Refuse `field` of a request to a model whose worker doesn't declare what it needs."""
    if capability not in card.capabilities:
        advice = _DETOKENIZING.get(capability, f"its worker does not declare the capability {capability!r}")
        raise UnsupportedError(f"model {card.name!r} does not support {field}: {advice}", param=field)


def with_defaults(
    request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard
) -> inference_pb2.PreprocessedRequest:
    """A copy of the request with everything that was left unset filled in from the card."""
    full = inference_pb2.PreprocessedRequest()
    full.CopyFrom(request)
    full.model = card.name
    if card.HasField("default_sampling_options"):
        full.sampling_options.CopyFrom(card.default_sampling_options)
        full.sampling_options.MergeFrom(request.sampling_options)
    if not full.eos_token_ids:
        full.eos_token_ids.extend(card.eos_token_ids)
    room = card.context_length - len(full.token_ids) if card.context_length and full.token_ids else None
    if not full.stop_conditions.HasField("max_tokens"):
        default = card.default_max_tokens if card.HasField("default_max_tokens") else room
        if default is not None:
            given = len(full.token_ids) - full.resume.num_prompt_tokens if full.HasField("resume") else 0
            full.stop_conditions.max_tokens = max(1, default - (given if card.HasField("default_max_tokens") else 0))
    if room is not None and full.stop_conditions.max_tokens > room:
        full.stop_conditions.max_tokens = room
    return full
