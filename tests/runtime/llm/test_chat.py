"""Chat templates: transformers' rendering for honest ones, a stop for the others."""

from __future__ import annotations

import pytest

from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.llm.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello “you”."},
    {"role": "user", "content": "Bye"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "inst": """{{ bos_token }}{% set ns = namespace(turn=0) %}
{% for message in messages if message['role'] != 'system' %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {% set ns.turn = ns.turn + 1 %}
    {% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
    {%- else %}{{ message.content }}{{ eos_token }}{% endif %}
{% endfor %}{{ ns.turn }}""",
    "tools": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{% if tools is none %}none{% endif %}",
    "controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content[:2] }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro show(m) %}[{{ m.role.upper() }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "formats": "{{ '%s is %d' % ('x', 3) }}{{ 'ab' * 3 }}{{ range(4) | list }}{{ dict(a=1).items() | list }}",
}


@pytest.mark.torch
@pytest.mark.parametrize("prompting", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_that_of_transformers(name, prompting):
    """The same text as `apply_chat_template`, unescaped and trimmed alike."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompting, **SPECIAL
    )
    mine = ChatTemplate(TEMPLATES[name]).render(MESSAGES, special=SPECIAL, add_generation_prompt=prompting)
    assert mine == theirs[0]


def test_the_date_can_be_asked_for():
    """Llama's templates print today."""
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES).isdecimal()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9999 ** 9999 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_hostile_templates_are_stopped(source):
    """Reaching out of the sandbox, endless work and endless text all end in one error, soon."""
    with pytest.raises(BadManifest, match="Do not trust this bundle"):
        ChatTemplate(source).render(MESSAGES)


def test_a_budget_is_for_one_rendering():
    """A template may use its whole budget each time."""
    template = ChatTemplate("{% for i in range(60000) %}{% endfor %}ok")
    assert [template.render(MESSAGES) for _ in range(3)] == ["ok"] * 3


def test_a_template_that_does_not_parse_is_the_bundles_fault():
    """Found when the bundle is opened."""
    with pytest.raises(BadManifest, match="does not parse"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ missing.part }}", "{{ 1 / 0 }}"]
)
def test_messages_it_does_not_accept_are_the_callers_fault(source):
    """In the template's own words, where it has any."""
    with pytest.raises(BadRequest, match=r"does not accept these messages: (roles must|'missing' is|division)"):
        ChatTemplate(source).render(MESSAGES)


def test_messages_are_not_changed():
    """The template works on a copy of plain data."""
    before = [dict(message) for message in MESSAGES]
    ChatTemplate(TEMPLATES["chatml"]).render(MESSAGES)
    assert before == MESSAGES
