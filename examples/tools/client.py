"""Asks until the model calls no more tools: `python client.py http://localhost:8000/v1 weather`."""

import json
import sys

from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def get_weather(city: str) -> str:
    """What the tool does."""
    return f"sunny in {city}"


client = OpenAI(base_url=sys.argv[1], api_key="none")
messages = [{"role": "user", "content": "How is the weather in Lisbon?"}]
while True:
    with client.chat.completions.stream(model=sys.argv[2], messages=messages, tools=[TOOL]) as stream:
        for event in stream:
            if event.type == "content.delta":
                print(event.delta, end="", flush=True)
        message = stream.get_final_completion().choices[0].message
    print()
    if not message.tool_calls:
        break
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
    for call in message.tool_calls:
        print(f"{call.function.name}({call.function.arguments})")
        answer = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})
