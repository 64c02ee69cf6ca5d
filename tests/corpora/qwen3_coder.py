"""Qwen 3 Coder."""

from __future__ import annotations

from tests.corpora import Entry

PARIS = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"

ENTRIES = {
    "one call": Entry(PARIS, "", [("get_weather", {"city": "Paris"})]),
    "several with text": Entry(
        f"I look.\n{PARIS}\n{PARIS}\nDone.",
        "I look.\nDone.",
        [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Paris"})],
    ),
    "types": Entry(
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=units>null</parameter>\n<parameter=places>\n[{"a": "\\u00e9"}]\n</parameter>\n</function>\n</tool_call>',
        "",
        [("get_weather", {"city": "12", "days": 3, "units": None, "places": [{"a": "é"}]})],
    ),
    "long text": Entry(
        "<tool_call><function=write_file><parameter=path>\n a.py \n</parameter><parameter=content>\n"
        'if a < b:\n    print("<parameter>")\n\n\n</parameter><parameter=overwrite>True</parameter></function></tool_call>',
        "",
        [
            (
                "write_file",
                {"path": " a.py ", "content": 'if a < b:\n    print("<parameter>")\n\n', "overwrite": True},
            )
        ],
    ),
    "no parameters": Entry("<tool_call>\n<function=get_time>\n</function>\n</tool_call>", "", [("get_time", {})]),
    "no outer tag": Entry(
        "<function=get_weather>\n<parameter=city>\nParis 🌊\n</parameter>\n</function>",
        "",
        [("get_weather", {"city": "Paris 🌊"})],
    ),
    "a tag left out": Entry(
        "<tool_call><function=get_weather><parameter=city>Paris\n<parameter=days>\n2\n</function></tool_call>",
        "",
        [("get_weather", {"city": "Paris", "days": 2})],
    ),
    "a value that isn't one": Entry(
        "<function=get_weather><parameter=days>soon</parameter></function>", "", [("get_weather", {"days": "soon"})]
    ),
    "cut": Entry(
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar",
        "",
        [("get_weather", '{"city": "Par')],
        is_cut=True,
    ),
    "cut in a number": Entry(
        "<function=get_weather><parameter=days>1", "", [("get_weather", '{"days": 1')], is_cut=True
    ),
    "cut in the name": Entry("<tool_call>\n<function=get_w", "<tool_call>\n<function=get_w", is_cut=True),
    "garbage": Entry("a <tool_call> b", "a <tool_call> b"),
    "a comparison": Entry("if a <b and c <function d", "if a <b and c <function d"),
    "thinking": Entry(f"Hm.\n</think>\n\n{PARIS}", "", [("get_weather", {"city": "Paris"})], "Hm.", is_thinking=True),
    "null or text": Entry(
        "<function=get_weather><parameter=units>2024</parameter><parameter=units>\nNone\n</parameter></function>",
        "",
        [("get_weather", '{"units": "2024", "units": null}')],
    ),
    "tags in a value": Entry(
        "<function=write_file>\n<parameter=content>\nx </function> <parameter=a> </tool_call>\n</parameter>\n</function>",
        "",
        [("write_file", {"content": "x </function> <parameter=a> </tool_call>"})],
    ),
    "no name": Entry("a \n<function=b\n c", "a \n<function=b\n c"),
    "a bracket left out": Entry(
        "<function=get_weather>\n<parameter=city\nParis, France\n</parameter>\n</function>",
        "",
        [("get_weather", {"city": "Paris, France"})],
    ),
}
