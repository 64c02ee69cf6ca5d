import pytest
from dynamo_frontend.templates import ChatTemplate

from dynamo_grpc import ConfigurationError, InvalidRequestError

MESSAGES = [{"role": "user", "content": "hi"}]


def test_a_template_gets_messages_and_tokens() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == "<s>[user]hi>"


def test_white_space_and_filters_are_as_in_transformers() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m | tojson }}\n    {% endif %}\n{% break %}{% endfor %}"
    assert (
        ChatTemplate(source, {}).render([{"role": "user", "content": "<ä>"}]) == '{"role": "user", "content": "<ä>"}\n'
    )


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(MESSAGES)
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatTemplate("{{ messages[0].content + 5 }}", {}).render(MESSAGES)


def test_a_template_is_in_a_sandbox() -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(MESSAGES)
    with pytest.raises(InvalidRequestError):
        ChatTemplate("{{ messages.append(1) }}", {}).render(MESSAGES)


def test_a_broken_template_says_where() -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatTemplate("a\n{% if %}", {})
