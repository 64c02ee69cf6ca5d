"""Chat templates are rendered as transformers renders the same file; and what a template may not do."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dynamo_frontend.templates import MAX_CHARS, ChatTemplate

from dynamo_grpc import ConfigurationError, InvalidRequestError
from dynamo_grpc.cards import load_model
from dynamo_grpc.testing import Mesh
from dynamo_grpc.worker import WorkerSettings, model_of

from ..conftest import eventually
from ..unit.test_vocabularies import ADDED, sentencepiece_file
from .front import FOLDER, Front
from .test_ingress import Talker

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "  Grüße, <b>you</b> 🙂\n"}
TOLD = {"role": "tool", "tool_call_id": "c1"}
ANSWER = {"role": "assistant", "content": " Well, I "}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
DOCUMENTS = [{"title": "Sea", "text": "It is wide."}, {"title": "Sky", "text": 'It is "high".'}]

#: Each needs another feature of templates.
TEMPLATES = {
    "white space": """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
<<{{ message.content | trim }}>>
    {% endif %}
  {% if message['role'] != 'system' %}
[{{ message['role'] }}] {{ message['content'].strip() }}{{ eos_token }}
  {% endif %}
{%- endfor %}
{% if add_generation_prompt %}
[assistant]
{%- endif %}""",
    "loop controls": """{% for m in messages %}{% if loop.index0 > 2 %}{% break %}{% endif %}\
{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}:\
{{ m.role }}={{ m.content }};{% endfor %}""",
    "namespaces and macros": """{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}\
{% set ns = namespace(count=0, system='') %}{% for m in messages %}\
{% if m.role == 'system' %}{% set ns.system = m.content %}{% else %}{% set ns.count = ns.count + 1 %}\
{{ turn(m.role, m.content) }}{% endif %}{% endfor %}{{ ns.count }}{{ ns.system }}\
{{ '<assistant>' if add_generation_prompt }}""",
    "documents": """{% if documents %}{% for d in documents %}{{ loop.index }}. {{ d.title }}: {{ d | tojson }}
{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}""",
    "json": """{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}\
{{ documents | tojson(separators=(',', ':'), sort_keys=true) if documents }}""",
    "variables of the request": """{% if thinking is defined and thinking %}<think>{% endif %}\
{{ style | default('plain') }}{% for m in messages %}{{ m.content }}{% endfor %}""",
    "generation marks": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}
{% endif %}{% endfor %}""",
    "parts": """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}\
{% for part in m.content %}({{ part.type }}){{ part.text }}{% endfor %}{% endif %};{% endfor %}""",
    "filters": """{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}\
{{ messages[1:] | length }}{{ messages[-1].content | upper | replace('E', '3') }}{{ messages[0].keys() | list | sort }}""",
    "tools": """{% if tools %}<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
{% for tool in tools %}{{ tool.function.name }}({{ (tool.function.parameters or {}).properties | default({}) | join(', ') }})\
{% endfor %}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}\
{% if m.reasoning_content is defined and loop.last %}({{ m.reasoning_content }}){% endif %}\
{% for call in m.tool_calls or [] %}{% set call = call.function if call.function is defined else call %}\
[{{ call.name }} {% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}\
{% for key, value in call.arguments.items() %};{{ key }}={{ value }}{% endfor %}]{% endfor %}\
{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}{% endfor %}""",
    "time": """{{ strftime_now('%Y-%m') }}{% for m in messages %}{{ m.content }}{% endfor %}""",
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}, "days": {}}}},
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "It's <now>."}}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ü", "days": 2}}}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "calls": [USER, {"role": "assistant", "content": "", "tool_calls": CALLS}, {**TOLD, "content": "rain"}],
    "one turn": [USER],
    "several": [SYSTEM, USER, ANSWER, USER],
    "ends with the assistant": [SYSTEM, USER, ANSWER],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no prompt": {"add_generation_prompt": False},
    "documents": {"documents": DOCUMENTS},
    "tools": {"tools": [WEATHER, CLOCK]},
    "variables": {"variables": {"thinking": True, "style": "short"}},
    "go on": {"continue_final_message": True, "add_generation_prompt": False},
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def transformers_render(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"add_generation_prompt": True, **options}
    variables = given.pop("variables", {})
    rendered, _ = render_jinja_template([messages], chat_template=source, **given, **variables, **TOKENS)
    return str(rendered[0])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("option", OPTIONS)
def test_as_transformers_does(template: str, chat: str, option: str) -> None:
    source, messages, options = TEMPLATES[template], CHATS[chat], OPTIONS[option]
    if (template, option) == ("json", "go on"):
        pytest.skip("there is no going on in JSON: transformers refuses it by the template's words")
    rendered: Any = None
    with contextlib.suppress(ValueError):  # the template changes the message, or leaves it out
        rendered = transformers_render(source, messages, options)
    if rendered is not None:
        assert ChatTemplate(source, TOKENS).render(messages, **options) == rendered
        return
    assert (option, template) in {("go on", "loop controls"), ("go on", "filters")}
    with pytest.raises(InvalidRequestError, match="doesn't write the last message"):
        ChatTemplate(source, TOKENS).render(messages, **options)


def test_arguments_as_clients_send_them() -> None:
    """As text; templates take a mapping, and some put text together."""
    function = {"name": "get_weather", "arguments": '{"city": "Ü",  "days": 2}'}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": function}]}]
    wanted = transformers_render(TEMPLATES["tools"], CHATS["calls"][:2], {})
    assert ChatTemplate(TEMPLATES["tools"], TOKENS).render(turns) == wanted
    source = (
        "{{ 'a' + messages[1].tool_calls[0].function.arguments + 'b' ~ messages[1].tool_calls[0].function.arguments }}"
    )
    assert ChatTemplate(source, {}).render(turns) == f"a{function['arguments']}b{function['arguments']}"
    for broken in ("{", "[1]", ""):
        function["arguments"] = broken
        assert f"[get_weather {broken}]" in ChatTemplate(
            TEMPLATES["tools"].split("{% for key")[0] + "]{% endfor %}{% endfor %}", {}
        ).render(turns)


async def test_named_templates(mesh: Mesh, front: Front, tmp_path: Path) -> None:
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    entries = [("default", "D"), ("rag", "R"), ("old", "O")]
    told = [{"name": name, "template": f"{text}{{{{ messages[0].content }}}}"} for name, text in entries]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": told}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools | length }}")
    (tmp_path / "additional_chat_templates" / "old.jinja").write_text("N")
    model = load_model(tmp_path, "own", runtime_config={"tool_call_parser": "hermes"})
    assert dict(model.card.named_chat_templates) == {
        "rag": "R{{ messages[0].content }}", "tool_use": "T{{ tools | length }}", "old": "N"
    }  # fmt: skip
    assert not load_model(tmp_path, "own", chat_template="x").card.named_chat_templates

    async def handler(request: Any) -> Any:
        yield 300

    await mesh.serve("own.backend.generate", handler, model)
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    body = {"model": "own", "messages": [USER], "max_tokens": 1}

    async def prompt(**options: Any) -> str:
        assert (await front.post({**body, **options})).status_code == 200
        tokens = (await front.post({**body, **options}, "/tokenize")).json()["tokens"]
        return str((await front.post({"model": "own", "tokens": tokens}, "/detokenize")).json()["prompt"])

    assert await prompt() == "D" + USER["content"]
    assert await prompt(chat_template="rag") == "R" + USER["content"]
    assert await prompt(tools=[WEATHER, CLOCK]) == "T2"
    assert await prompt(tools=[WEATHER], chat_template="default") == "D" + USER["content"]
    error = await front.error({**body, "chat_template": "{{ messages }}"}, 400)
    assert "there are default, old, rag, tool_use" in error["message"]


def test_going_on_in_a_message_that_is_not_there() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", {}
    )
    with pytest.raises(InvalidRequestError, match="doesn't write the last message"):
        template.render([USER, ANSWER], continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="the last message has no text"):
        template.render([USER, {"role": "assistant", "content": None}], continue_final_message=True)
    whole = ChatTemplate(TEMPLATES["parts"], TOKENS)
    assert whole.render([PARTS], continue_final_message=True, add_generation_prompt=False).endswith("(text)two")


def test_content_in_parts() -> None:
    source = TEMPLATES["parts"]
    assert ChatTemplate(source, TOKENS).render([PARTS]) == transformers_render(source, [PARTS], {})
    assert ChatTemplate(source, TOKENS).takes_parts
    plain = ChatTemplate("{% for m in messages %}{{ m['content'] }};{% endfor %}", TOKENS)
    assert not plain.takes_parts  # and would write a Python list
    assert plain.render([PARTS, USER]) == f"one\ntwo;{USER['content']};"
    looping = "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}"
    assert ChatTemplate(looping, TOKENS).takes_parts
    named = "{% for m in messages %}{% set content = m.content %}{% if content is not string %}x{% endif %}{% endfor %}"
    assert ChatTemplate(named, TOKENS).takes_parts


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "longer than|more than"),
        ("{{ 'x' * 99999999999 }}", "more than"),
        ("{{ 99999999999 * 'x' }}", "more than"),
        ("{{ [1] * 99999999999 }}", "more than"),
        ("{{ 9 ** 99999999999 }}", "more than"),
        ("{% set ns = namespace(t='xxxxxxxx') %}{% for a in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}", "more than"),
        ("{% set ns = namespace(t='xxxxxxxx') %}{% for a in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}", "more than"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ raise_exception('after user comes assistant') }}", "after user comes assistant"),
    ],
)  # fmt: skip
def test_what_a_template_may_not_do(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_frontend.templates.MAX_S", 0.2)
    with pytest.raises(InvalidRequestError, match=said):
        ChatTemplate(source, {}).render([USER])


def test_large_prompts_are_no_crime() -> None:
    text = "word " * 200_000
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    rendered = ChatTemplate(source, {}).render([{"role": "user", "content": text}] * 3)
    assert len(rendered) == 3 * (len(text) + 6) < MAX_CHARS


async def test_over_http(mesh: Mesh, front: Front) -> None:
    source = (
        "{{ style | default('plain') }}|{% for d in documents or [] %}{{ d.text }}|{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )

    async def handler(request: Any) -> Any:
        yield 300

    await mesh.serve("own.backend.generate", handler, load_model(FOLDER, "own", chat_template=source))
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    body = {"model": "own", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]}

    async def prompt(**options: Any) -> str:
        tokens = (await front.post({**body, **options}, "/tokenize")).json()["tokens"]
        answered = await front.post({**body, **options, "max_tokens": 1})
        assert answered.json()["usage"]["prompt_tokens"] == len(tokens)
        assert "x-warning" not in answered.headers
        return str((await front.post({"model": "own", "tokens": tokens}, "/detokenize")).json()["prompt"])

    assert await prompt() == "plain|<user>hi</><assistant>Well</><a>"
    assert await prompt(add_generation_prompt=False) == "plain|<user>hi</><assistant>Well</>"
    assert await prompt(continue_final_message=True) == "plain|<user>hi</><assistant>Well"
    documents = [{"text": "one"}, {"text": "two"}]
    options = {"chat_template_kwargs": {"style": "terse"}, "documents": documents}
    assert (await prompt(**options)).startswith("terse|one|two|<user>")
    both = {"add_generation_prompt": True, "continue_final_message": True}
    error = await front.error({**body, **both}, 400)
    assert "not both" in error["message"]
    await mesh.serve_worker(Talker())
    await eventually(lambda: len(front.frontend.catalog.ready()) == 3)
    error = await front.error({**body, "model": "talker", "chat_template_kwargs": {}}, 400)
    assert error["param"] == "chat_template_kwargs"


def test_another_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert (
        model_of(Talker, WorkerSettings(chat_template=str(tmp_path / "own.jinja"))).card.chat_template
        == "{{ messages[0].content }}"
    )
    with pytest.raises(ConfigurationError, match=r"no\.jinja' can't be read"):
        model_of(Talker, WorkerSettings(chat_template=str(tmp_path / "no.jinja")))


async def test_a_model_with_sentencepiece(mesh: Mesh, front: Front, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**ADDED, "chat_template": "<|end|>{{ messages[0].content }}"})
    )

    async def handler(request: Any) -> Any:
        for token_id in request["token_ids"]:
            yield {"token_ids": [token_id]}

    await mesh.serve("own.backend.generate", handler, load_model(tmp_path, "own"))
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    body = {"model": "own", "messages": [{"role": "user", "content": "the sea 🌊"}], "max_tokens": 50}
    whole = (await front.post(body)).json()["choices"][0]["message"]["content"]
    assert whole.strip() == "the sea 🌊"
    streamed = await front.openai.chat.completions.create(**body, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in streamed]) == whole
