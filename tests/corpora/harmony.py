"""gpt-oss."""

from __future__ import annotations

from tests.corpora import Entry

THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'

ENTRIES = {
    "an answer": Entry("<|channel|>final<|message|>Yes. <|return|>", "Yes."),
    "reasoning and an answer": Entry(THOUGHT + "<|channel|>final<|message|>Yes 🌊.", "Yes 🌊.", reasoning="They ask."),
    "reasoning and a call": Entry(THOUGHT + CALL + "<|call|>", "", [("get_weather", {"city": "Paris"})], "They ask."),
    "the call's end is hidden": Entry(THOUGHT + CALL, "", [("get_weather", {"city": "Paris"})], "They ask."),
    "a preamble and calls": Entry(
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL + "<|call|><|start|>assistant "
        "to=functions.get_time<|channel|>commentary json<|message|>{}<|call|>",
        "I look.",
        [("get_weather", {"city": "Paris"}), ("get_time", {})],
    ),
    "the recipient first": Entry(
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"places": [{"a": "<|x|>"}]}<|call|>',
        "",
        [("get_weather", {"places": [{"a": "<|x|>"}]})],
    ),
    "no arguments": Entry("<|channel|>commentary to=functions.get_time<|message|><|call|>", "", [("get_time", {})]),
    "a tool of its own": Entry("<|channel|>analysis to=python code<|message|>1+1<|call|>", "", reasoning="1+1"),
    "cut in the arguments": Entry(CALL[:-4], "", [("get_weather", '{"city": "Par')], is_cut=True),
    "cut in the reasoning": Entry("<|channel|>analysis<|message|>They a", "", reasoning="They a", is_cut=True),
    "cut in the header": Entry("<|channel|>commentary to=func", "<|channel|>commentary to=func", is_cut=True),
    "plain": Entry("No channel <| at all.", "No channel <| at all."),
    "a recipient without its space": Entry(
        '<|channel|>commentary to=get_time<|message|>{"a": 1}<|call|>', "", [("get_time", {"a": 1})]
    ),
    "messages stand apart": Entry(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant"
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "I look.\nYes.",
        reasoning="a\nb",
    ),
}
