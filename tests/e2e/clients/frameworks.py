"""LangChain's ChatOpenAI and LiteLLM against a frontend: python frameworks.py URL"""

import asyncio
import functools
import sys

import litellm
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

URL = f"{sys.argv[1]}/v1"
QUESTION = "Tell me about the sea"


def langchain() -> None:
    model = ChatOpenAI(model="tiny", base_url=URL, api_key="none", seed=1, max_tokens=12, max_retries=0)
    whole = model.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == whole.content
    batch = model.batch([QUESTION, "Tell me about bread"])
    assert batch[0].content == whole.content
    assert batch[1].content != whole.content


def lite() -> None:
    options = {
        "model": "openai/tiny", "api_base": URL, "api_key": "none", "seed": 1, "max_tokens": 12, "num_retries": 0,
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    whole = litellm.completion(**options)
    text = whole.choices[0].message.content
    assert text
    streamed = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    told = ""
    try:
        litellm.completion(**{**options, "model": "openai/nobody"})
    except litellm.NotFoundError as error:
        told = str(error)
    assert "there is no model 'nobody'" in told
    assert asyncio.run(litellm.acompletion(**options)).choices[0].message.content == text


WEATHER = "How is the weather in Lisbon?"
FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def tools() -> None:
    model = ChatOpenAI(model="weather", base_url=URL, api_key="none", max_retries=0).bind_tools([get_weather])
    first = model.invoke(WEATHER)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Lisbon"})
    chunks = list(model.stream(WEATHER))
    streamed = functools.reduce(lambda a, b: a + b, chunks)
    assert streamed.tool_calls[0]["args"] == {"city": "Lisbon"}
    answer = model.invoke([HumanMessage(WEATHER), first, get_weather.invoke(call)])
    assert answer.content == "It is sunny in Lisbon."
    options = {
        "model": "openai/weather", "api_base": URL, "api_key": "none", "num_retries": 0,
        "messages": [{"role": "user", "content": WEATHER}], "tools": [{"type": "function", "function": FUNCTION}],
    }  # fmt: skip
    whole = litellm.completion(**options)
    built = litellm.stream_chunk_builder(list(litellm.completion(**options, stream=True)))
    for found in (whole, built):
        (made,) = found.choices[0].message.tool_calls
        assert (made.function.name, made.function.arguments) == ("get_weather", '{"city": "Lisbon"}')
        assert found.choices[0].finish_reason == "tool_calls"
        assert "weather of Lisbon" in found.choices[0].message.reasoning_content


langchain()
lite()
tools()
print("all is well")
