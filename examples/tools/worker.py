"""A worker that takes messages and tools, and says itself what it thinks and which tools it calls."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from dynamo_grpc import Context, ModelInput, ModelType, Worker, run
from dynamo_grpc.v1.inference_pb2 import ChoiceDelta, PreprocessedRequest


class Weather(Worker):
    """Asks for the weather of the city that the last word names, and says it again."""

    model_name = "weather"
    model_input = ModelInput.Text
    model_type = ModelType.Chat
    capabilities = ("tools",)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        last = request.messages[-1]
        said = last.content[0].text.text
        if last.role == "tool":
            yield f"It is {said}."
            return
        city = said.split()[-1].rstrip("?")
        yield ChoiceDelta(reasoning=f"I don't know the weather of {city}. ")
        if not request.HasField("tools"):
            yield "I don't know."
            return
        name = request.tools["tools"][0]["function"]["name"]
        yield ChoiceDelta(reasoning=f"{name} does.")
        yield ChoiceDelta(tool_calls=[{"index": 0, "id": "call_1", "name": name}])
        yield ChoiceDelta(tool_calls=[{"index": 0, "arguments": json.dumps({"city": city})}])


if __name__ == "__main__":
    run(Weather)
