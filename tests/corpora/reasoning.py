"""Reasoning without tools, by the name of its parser."""

from __future__ import annotations

from tests.corpora import Entry

FAMILIES = {
    "qwen3": {
        "with its tag": Entry("<think>\nOne\n\ntwo.\n</think>\n\nThree. ", "Three. ", reasoning="One\n\ntwo."),
        "opened by the prompt": Entry("One.</think>Three.", "Three.", reasoning="One.", is_thinking=True),
        "none": Entry(" <thin ice", " <thin ice"),
        "never closed": Entry("<think>One <", "", reasoning="One <", is_cut=True),
        "later": Entry("a <think>b</think>", "a <think>b</think>"),
        "calls are text": Entry("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
    },
    "mistral": {"with its token": Entry("[THINK]Hm. [1][/THINK]Yes.", "Yes.", reasoning="Hm. [1]")},
    "kimi": {"with its tag": Entry("◁think▷Hm ◁.◁/think▷Yes.", "Yes.", reasoning="Hm ◁.")},
    "granite": {
        "with its words": Entry("Here is my thought process:\nHm.\nHere is my response:\nYes.", "Yes.", reasoning="Hm.")
    },
}
