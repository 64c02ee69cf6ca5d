"""Parsers: the same from every way of cutting an answer, nothing held back that needn't be, nothing lost."""

from __future__ import annotations

import importlib
import json
import random

import pytest
from dynamo_frontend.parsers.base import Parser, Plain
from dynamo_frontend.parsers.families import REASONING_PARSERS, TOOL_PARSERS, family_of
from dynamo_frontend.parsers.forced import Forced
from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Said, Text
from dynamo_frontend.parsers.tools import Tools
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_grpc import ConfigurationError
from tests.corpora import TOOLS, Entry
from tests.corpora.reasoning import FAMILIES

CORPORA = ["hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "deepseek_v3", "deepseek_v3_2", "harmony"]
THINKING = {"mistral": "mistral"}


def entries() -> list[tuple[str, str, str, Entry]]:
    """Tool parser, reasoning parser, name and entry of all corpora."""
    found = []
    for family in CORPORA:
        corpus = importlib.import_module(f"tests.corpora.{family}").ENTRIES
        found += [(family, THINKING.get(family, "qwen3"), name, entry) for name, entry in corpus.items()]
    for reasoning, corpus in FAMILIES.items():
        found += [("none", reasoning, name, entry) for name, entry in corpus.items()]
    return found


ENTRIES = entries()
IDS = [f"{family}-{reasoning}-{name}".replace(" ", "_") for family, reasoning, name, _ in ENTRIES]


def parser_of(tool_parser: str, reasoning_parser: str, *, is_thinking: bool = False) -> Parser:
    thinking = REASONING_PARSERS[reasoning_parser]
    return TOOL_PARSERS[tool_parser](Tools(TOOLS), thinking, is_thinking=is_thinking, rng=random.Random(1))


def fold(said: list[Said]) -> tuple[str, str, list[list[str]]]:
    """Text, reasoning, and each call's id, name and arguments."""
    text, reasoning, calls = "", "", []
    for one in said:
        if isinstance(one, Text):
            text += one.text
        elif isinstance(one, Reasoning):
            reasoning += one.text
        elif isinstance(one, Call):
            assert one.index == len(calls)
            calls.append([one.id, one.name, ""])
        else:
            assert isinstance(one, Arguments)
            assert one.index == len(calls) - 1
            calls[-1][2] += one.text
    return text, reasoning, calls


def read(parser: Parser, pieces: list[str]) -> tuple[str, str, list[list[str]]]:
    said = [one for piece in pieces for one in parser.feed(piece)]
    assert all(one.text for one in said if not isinstance(one, Call))
    return fold(said + parser.end())


@pytest.mark.parametrize(("tools", "reasoning", "name", "entry"), ENTRIES, ids=IDS)
def test_every_entry_says_what_it_says(tools, reasoning, name, entry):
    text, thought, calls = read(parser_of(tools, reasoning, is_thinking=entry.is_thinking), [entry.raw])
    assert (text, thought) == (entry.text, entry.reasoning)
    assert [name for _, name, _ in calls] == [name for name, _ in entry.calls]
    for (_, _, told), (_, wanted) in zip(calls, entry.calls, strict=True):
        assert (told == wanted) if isinstance(wanted, str) else (json.loads(told) == wanted)


@pytest.mark.parametrize(("tools", "reasoning", "name", "entry"), ENTRIES, ids=IDS)
def test_every_way_of_cutting_gives_the_same(tools, reasoning, name, entry):
    raw, rng = entry.raw, random.Random(2)
    whole = read(parser_of(tools, reasoning, is_thinking=entry.is_thinking), [raw])
    ways = [list(raw)] + [[raw[:at], raw[at:]] for at in range(len(raw))]
    for _ in range(20):
        places = sorted(rng.choices(range(len(raw) + 1), k=rng.randrange(1, 12)))
        ways.append([raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)])
    for pieces in ways:
        assert read(parser_of(tools, reasoning, is_thinking=entry.is_thinking), pieces) == whole


MARKS = [
    "<tool_call>", "</tool_call>", '{"name": "get_time"', ', "arguments": {', "}}", "}", "[", "]", "\n", " ", '"', "\\",
    "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "get_time", "(", ")", "days=", "1", "'", "<function=", "<parameter=", ">",
    "</parameter>", "</function>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<|channel|>", "<|message|>", "<|end|>", "analysis", " to=functions.get_time", "<think>", "</think>", ";", ",", "x", "🌊",
    '<｜DSML｜function_calls>', '<｜DSML｜invoke name="', '">', "`", "{",
]  # fmt: skip


@pytest.mark.parametrize("tools", CORPORA)
@given(pieces=st.lists(st.sampled_from(MARKS), max_size=14), cut=st.integers(1, 7), is_thinking=st.booleans())
@settings(max_examples=150, deadline=None)
def test_garbage_is_never_lost_and_reads_the_same(tools, pieces, cut, is_thinking):
    raw = "".join(pieces)
    whole = read(parser_of(tools, "qwen3", is_thinking=is_thinking), [raw])
    cuts = [raw[at : at + cut] for at in range(0, len(raw), cut)]
    assert read(parser_of(tools, "qwen3", is_thinking=is_thinking), cuts) == whole
    text, thought, calls = whole
    told = text + thought + "".join(name + arguments for _, name, arguments in calls)
    if not calls and tools != "harmony":  # of a call, keys that nobody knows are left out; of harmony, headers
        assert (told.count("x"), told.count("🌊")) == (raw.count("x"), raw.count("🌊"))


@pytest.mark.parametrize("tools", CORPORA)
def test_text_is_never_held_back(tools):
    parser = parser_of(tools, "qwen3")
    for word in ("Plain", " text", ", with 1 < 2", " words", "."):
        assert fold(parser.feed(word))[0] == word


@pytest.mark.parametrize(
    ("tools", "before"),
    [
        ("hermes", '<tool_call>{"name": "write_file", "arguments": {"content": "'),
        ("llama3_json", '{"name": "write_file", "parameters": {"content": "'),
        ("mistral", '[TOOL_CALLS]write_file{"content": "'),
        ("pythonic", '[write_file(content="'),
        ("qwen3_coder", "<function=write_file><parameter=content>\n"),
        ("deepseek_v3", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{"content": "'),
        (
            "deepseek_v3_2",
            '<｜DSML｜function_calls><｜DSML｜invoke name="write_file"><｜DSML｜parameter name="content" string="true">',
        ),
        ("harmony", '<|channel|>commentary to=functions.write_file<|message|>{"content": "'),
    ],
)
def test_arguments_are_told_as_they_come(tools, before):
    parser = parser_of(tools, "qwen3")
    (call, begun) = parser.feed(before)
    assert (call.name, begun.text) == ("write_file", '{"content": "')
    for word in ("some", " words", " 🌊"):
        assert parser.feed(word) == [Arguments(0, word)]


def test_reasoning_is_told_as_it_comes():
    parser = parser_of("hermes", "qwen3", is_thinking=True)
    assert parser.feed("\nOne") == [Reasoning("One")]
    assert parser.feed(" two") == [Reasoning(" two")]
    assert parser.is_in_reasoning
    assert parser.feed("</thi") == []
    assert parser.feed("nk>\n\nThree") == [Text("Three")]
    assert not parser.is_in_reasoning


def test_mistral_makes_ids_that_its_templates_take():
    ((call, _),) = [parser_of("mistral", "none").feed("[TOOL_CALLS]get_time{}")]
    assert len(call.id) == 9
    assert call.id.isalnum()
    (call, _) = parser_of("mistral", "none").feed("[TOOL_CALLS]get_time[CALL_ID]a1B2c3D4e[ARGS]{}")
    assert call.id == "a1B2c3D4e"


@pytest.mark.parametrize(
    ("names", "raw", "calls"),
    [
        (["get_time"], ' {"a": [1]} ', [("get_time", '{"a": [1]}')]),
        (
            ["get_time", "get_weather"],
            '[{"name": "get_weather", "parameters": {"city": "x"}}, {"name": "get_time", "parameters": {}}]',
            [("get_weather", '{"city": "x"}'), ("get_time", "{}")],
        ),
    ],
)
def test_forced_calls(names, raw, calls):
    tools = Tools({name: TOOLS[name] for name in names})
    for pieces in ([raw], list(raw)):
        text, _, made = read(Forced(tools), pieces)
        assert (text.strip(), [(name, arguments) for _, name, arguments in made]) == ("", calls)
    assert read(Forced(tools), ["No."])[0] == "No."


#: What costs most where something is looked at again and again: pieces, and what stands before them.
LONG = [
    ("word ", ""), ("<", ""), ("{", ""), ("[", ""), ("\n", ""), (" ", ""), ("\n{", ""), ("\n[", ""), ("<tool_call>", ""),
    ("[TOOL_CALLS]", ""), ("[", '<tool_call>{"name": "f", "arguments": '), ("x", '<tool_call>{"arguments": "'),
    ("x", "<function="), ("\n", "<|channel|>analysis<|message|>"), ("\n", "<|channel|>commentary to=f<|message|>"),
    ("x", "<|channel|>"), ("x", '<｜DSML｜function_calls><｜DSML｜invoke name="'), ("<", "<function=f><parameter=a>"),
    ("x", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"), ("\\", '[write_file(path="'), (" ", "<think>"),
    ("'a'", "[write_file(path="), ("[", "[write_file(path="),
]  # fmt: skip


@pytest.mark.parametrize("tools", [*CORPORA, "none"])
def test_long_answers_cost_what_they_are_long(tools):
    for piece, before in LONG:
        for cuts in ([before] + [piece] * 6_000, [before + piece * 60_000]):
            parser = parser_of(tools, "qwen3")
            for cut in cuts:
                parser.feed(cut)
            parser.end()  # what is quadratic takes minutes, and a unit test has 20 s


def test_families_by_name_and_by_template():
    assert family_of("", "", "{{ messages }}").tools is None
    assert family_of("", "", "… <tool_call> … <think></think>").tools is TOOL_PARSERS["hermes"]
    assert family_of("", "", "… <tool_call> … <think></think>").thinking == REASONING_PARSERS["basic"]
    assert family_of("mistral", "none", "<tool_call> </think>") == family_of("mistral", "", "")
    assert family_of("", "gpt_oss", "").thinks
    assert family_of("", "deepseek_r1", "").is_always_thinking
    assert TOOL_PARSERS["none"] is Plain
    with pytest.raises(ConfigurationError, match="did you mean 'hermes'"):
        family_of("hermess", "", "")
