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
    """

    def __init__(self, request: pb.PreprocessedRequest, limit: int) -> None:
        self.num_migrations = 0
        self._request, self._limit = request, limit
        self._token_ids: list[int] = []
        self._is_finished = self._has_text = False

    def add(self, outputs: Sequence[pb.GenerateResponse | int]) -> None:
        """Take outputs as the reader is given them; an int is one more token."""
        for output in outputs:
            if type(output) is int:
                self._token_ids.append(output)
                continue
            assert isinstance(output, pb.GenerateResponse)
            for delta in output.choices:
                self._token_ids += delta.token_ids
                self._is_finished = self._is_finished or delta.HasField("finish")
                self._has_text = self._has_text or (bool(delta.text) and not delta.token_ids)

    @property
    def refusal(self) -> str:
        """Why it can't go on elsewhere, in a few words; empty when it can."""
        options = self._request.sampling_options
        if self.num_migrations >= self._limit:
            return f"it has gone on elsewhere {self.num_migrations} times" if self._limit else "migration is off"
        if not self._request.token_ids or self._has_text:
            return "its worker takes or gives text"
        if options.n > 1 or options.best_of > 1 or options.use_beam_search:
            return "it has several choices at once"
        if self._request.HasField("guided_decoding"):
            return "its guided decoding has a state that isn't known here"
        return ""

    def ending(self) -> pb.GenerateResponse | None:
        """What is still to be told of an answer that was whole when its worker was lost; None if it wasn't.

        The output is empty if its finish was given before.
        """
        stop = self._request.stop_conditions
        if self._is_finished:
            return pb.GenerateResponse()
        if stop.HasField("max_tokens") and len(self._token_ids) >= stop.max_tokens:
            self._is_finished = True
            return pb.GenerateResponse(choices=[pb.ChoiceDelta(finish=pb.FinishInfo(reason=pb.FINISH_REASON_LENGTH))])
        return None

    def resumed(self) -> pb.PreprocessedRequest:
        """The request that continues it."""
        self.num_migrations += 1
        request, count = pb.PreprocessedRequest(), len(self._token_ids)
        request.CopyFrom(self._request)
        request.resume.num_prompt_tokens = self._request.resume.num_prompt_tokens or len(self._request.token_ids)
        request.resume.num_attempts = self._request.resume.num_attempts + self.num_migrations
        request.token_ids.extend(self._token_ids)
        stop = request.stop_conditions
        if stop.HasField("max_tokens"):
            stop.max_tokens -= count
        if stop.HasField("min_tokens"):
            stop.min_tokens = max(0, stop.min_tokens - count)
        return request
