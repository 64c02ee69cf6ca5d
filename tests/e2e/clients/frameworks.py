"""LangChain's ChatOpenAI and LiteLLM against a frontend: python frameworks.py URL"""

import asyncio
import sys

import litellm
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


langchain()
lite()
print("all is well")
