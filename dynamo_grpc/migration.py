"""A model's answer that goes on at another worker: what it gave so far, and the request that continues it. Pure.

The resumed request is the first one with the tokens given so far behind its prompt, and with what is left of max_tokens
and min_tokens; `resume` says where the prompt ended, so that penalties, usage and a seeded draw count from there.
Detokenizer and stop strings are not asked: they live with whoever reads the outputs, and see one answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_grpc.v1 import inference_pb2 as pb

#: How often a request goes on elsewhere after its first output, unless the model's card or a setting says otherwise.
MIGRATION_LIMIT = 3


class Answer:
    """What a request has given.

    Args:
        request: as it was sent first.
        limit: how often it may go on elsewhere after its first output; 0 is never.

    Attributes:
        has_begun: whether anything was given.
        num_migrations: how often it has gone on elsewhere; counted by whoever sends it.
    """

    def __init__(self, request: pb.PreprocessedRequest, limit: int) -> None:
        self.num_migrations = 0
        self.has_begun = False
        self._request, self._limit = request, limit
        self._token_ids: list[int] = []
        self._is_finished = self._has_text = self._has_others = False

    def add(self, outputs: Sequence[pb.GenerateResponse | int]) -> None:
        """Take outputs as the reader is given them; an int is one more token."""
        self.has_begun = True
        for output in outputs:
            if type(output) is int:
                self._token_ids.append(output)
                continue
            assert isinstance(output, pb.GenerateResponse)
            for delta in output.choices:
                self._token_ids += delta.token_ids
                self._is_finished = self._is_finished or delta.HasField("finish")
                self._has_text = self._has_text or delta.HasField("text")
                self._has_others = self._has_others or delta.index != 0

    @property
    def is_finished(self) -> bool:
        """Whether a choice has ended."""
        return self._is_finished

    @property
    def obstacle(self) -> str:
        """What in it can't be continued by anybody, in a few words; empty when all can."""
        request, options = self._request, self._request.sampling_options
        if not request.token_ids or self._has_text:
            return "its worker takes or gives text"
        if options.n > 1 or options.best_of > 1 or options.use_beam_search or self._has_others:
            return "it has several choices at once"
        if request.HasField("guided_decoding"):
            return "its guided decoding has a state that isn't known here"
        if request.stop_conditions.HasField("max_thinking_tokens"):
            return "how much of its thinking is done isn't known here"
        return ""

    @property
    def refusal(self) -> str:
        """Why it can't go on elsewhere, in a few words; empty when it can."""
        if self.num_migrations >= self._limit:
            return f"it has gone on elsewhere {self.num_migrations} times" if self._limit else "migration is off"
        return self.obstacle

    def ending(self, *, is_stopped: bool = False) -> pb.GenerateResponse | None:
        """What is still to be told of an answer that was whole when its worker was lost; None if it wasn't.

        The output is empty if its finish was given before.

        Args:
            is_stopped: the client asked for an early end: it gets one.
        """
        if self.obstacle:
            return None
        if self._is_finished:
            return pb.GenerateResponse()
        stop = self._request.stop_conditions
        if stop.HasField("max_tokens") and len(self._token_ids) >= stop.max_tokens:
            return _finish(pb.FINISH_REASON_LENGTH)
        ending = {*stop.stop_token_ids, *stop.stop_token_ids_hidden}
        if not stop.ignore_eos:
            ending |= {*self._request.eos_token_ids}
        if self._token_ids and self._token_ids[-1] in ending and len(self._token_ids) >= stop.min_tokens:
            return _finish(pb.FINISH_REASON_STOP)
        return _finish(pb.FINISH_REASON_CANCELLED) if is_stopped else None

    def resumed(self, card_checksum: str = "") -> pb.PreprocessedRequest:
        """The request that continues it.

        Args:
            card_checksum: of the model card whose worker began; another model's tokens mean something else.
        """
        request, count = pb.PreprocessedRequest(), len(self._token_ids)
        request.CopyFrom(self._request)
        request.resume.num_prompt_tokens = self._request.resume.num_prompt_tokens or len(self._request.token_ids)
        request.resume.num_attempts = self._request.resume.num_attempts + self.num_migrations + 1
        request.token_ids.extend(self._token_ids)
        if card_checksum and not request.mdc_sum:
            request.mdc_sum = card_checksum
        for name in ("prefill_result", "kv_transfer_params"):  # of the prompt alone, and of the first worker
            request.ClearField(name)  # type: ignore[arg-type]
        if request.HasField("output_options"):
            request.output_options.ClearField("prompt_logprobs")  # told before
        stop = request.stop_conditions
        if stop.HasField("max_tokens"):
            stop.max_tokens -= count
        if stop.HasField("min_tokens"):
            stop.min_tokens = max(0, stop.min_tokens - count)
        return request


def _finish(reason: pb.FinishReason.ValueType) -> pb.GenerateResponse:
    return pb.GenerateResponse(choices=[pb.ChoiceDelta(finish=pb.FinishInfo(reason=reason))])
