"""`dynamo-grpc card`: the model card of a folder, for workers in other languages."""

from __future__ import annotations

from typing import Any

import click
from google.protobuf import json_format

from dynamo_grpc.cards import CAPABILITIES, ModelInput, ModelType, load_model, read_template
from dynamo_grpc.cli.options import MeshCommand


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc card ./llama-3 --name llama-3 > card.json
  dynamo-grpc card --name shout --input text > card.json""",
)
@click.argument("model_path", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--name", default="", help="Name that clients ask for; the folder's by default.")
@click.option(
    "--input", "takes", default="tokens", type=click.Choice(["tokens", "text"]), help="What its workers take."
)
@click.option(
    "--type",
    "types",
    multiple=True,
    default=("chat", "completions"),
    show_default=True,
    type=click.Choice([kind.name.lower() for kind in ModelType if kind.name]),
    help="What it can be asked for; may be given again.",
)
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="|".join(sorted(CAPABILITIES)),
    help="Optional ability of its workers; may be given again.",
)
@click.option(
    "--context-length", type=click.IntRange(1), help="Tokens of prompt and answer together; the folder's by default."
)
@click.option("--chat-template", help="File with another chat template than the folder's.", type=click.Path())
@click.option("--tool-call-parser", help="How the model writes calls of tools, where its template doesn't tell.")
@click.option("--reasoning-parser", help="How the model marks reasoning, where its template doesn't tell.")
def card(
    model_path: str | None,
    name: str,
    takes: str,
    types: tuple[str, ...],
    chat_template: str | None,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
    **options: Any,
) -> None:
    """Print the model card of a folder as JSON: what a worker in any language registers and describes itself with."""
    kinds = ModelType(0)
    for kind in types:
        kinds |= ModelType[kind.title()]
    model = load_model(
        model_path,
        name,
        model_input=ModelInput.Text if takes == "text" else ModelInput.Tokens,
        model_type=kinds,
        chat_template=read_template(chat_template) if chat_template else None,
        runtime_config={"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser},
        **options,
    )
    click.echo(json_format.MessageToJson(model.card, preserving_proto_field_name=True))
