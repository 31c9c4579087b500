import json
import shutil
import time
from pathlib import Path

import pytest
from heedful_server.errors import InvalidRequest, ModelUnusable
from heedful_server.text import budget
from heedful_server.text.template import DEFAULT_TEMPLATE, ChatTemplate

CHAT = [("system", "Be brief."), ("user", " Hi \u2603 "), ("assistant", "Yo."), ("user", "Bye?")]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content ~ '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (system if loop.first else '') ~ message.content.strip() ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
FEATURES = """\
{%- macro header(role) -%}<h {{ role | upper }}>{%- endmacro -%}
{%- set ns = namespace(count=0, last='') -%}
{%- for message in messages | reverse | list -%}
  {%- if message.role == 'assistant' %}{% continue %}{% endif -%}
  {%- set ns.count = ns.count + 1 -%}
  {{ header(message.role) }}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}
  {%- set ns.last = message -%}
{%- else -%}none{%- endfor -%}
{{ ns.count }}|{{ ns.last | tojson }}|{{ ns.last | tojson(indent=2) }}|
{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}
{{ messages | map(attribute='role') | join(', ') }}|{{ tools is none }}|{{ missing is defined }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'a\nb' | indent(4) }}|{{ 'a-b'.split('-') }}|{{ 'abc'[::-1] }}|{{ 'x' ~ 1 ~ none }}|
{{ {'k': [1, 2.5]}.items() | list }}|{{ dict(a=1).a }}|{{ 'aXa' | replace('a', 'bb') }}|
{{ '%s-%d' % ('a', 3) }}|{{ '{}/{x}'.format('p', x='q') }}|{{ ['b', 'a'] | sort | first }}|
{{ 3 * 'ab' }}|{{ 2 ** 10 }}|{{ messages[0].get('name', 'nobody') }}|{{ 7 // 2 }}
"""


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, FEATURES])
def test_templates_render_as_they_do_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": content} for role, content in CHAT]
    expected, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **TOKENS
    )
    assert ChatTemplate(source, TOKENS).render(CHAT) == expected[0]


def test_a_template_that_refuses_a_conversation_gives_its_own_reason() -> None:
    template = ChatTemplate(ALTERNATING, TOKENS)
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([("user", "a"), ("user", "b")])
    assert caught.value.field == "prompt.chat"


def test_strftime_now_gives_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]) == time.strftime("%Y")


def test_the_default_template_is_plain_and_opens_the_assistants_turn() -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE, {"bos_token": ""}, is_default=True)
    expected = "Be brief.\n\nUser: Hi \u2603\nAssistant: Yo.\nUser: Bye?\nAssistant:"
    assert template.render(CHAT) == expected


def test_the_default_template_refuses_other_roles() -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE, {"bos_token": ""}, is_default=True)
    with pytest.raises(InvalidRequest, match="not tool"):
        template.render([("tool", "42")])


def test_a_model_without_a_template_gets_the_default_one_with_its_opening_token(
    vocab_files_dir: Path, byte_level_dir: Path
) -> None:
    opening = ChatTemplate.load(vocab_files_dir)
    assert opening.is_default
    assert opening.render([("user", "hi")]) == "</s>User: hi\nAssistant:"
    plain = ChatTemplate.load(byte_level_dir)
    assert plain.render([("user", "hi")]) == "User: hi\nAssistant:"
    assert plain.identity == opening.identity


def test_a_template_file_wins_over_the_tokenizers_configuration(
    byte_level_dir: Path, tmp_path: Path
) -> None:
    model_dir = shutil.copytree(byte_level_dir, tmp_path / "model")
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "named"}]
    for value, expected in (("{{ bos_token }}string", "<|start|>string"), (named, "named")):
        (model_dir / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": value})
        )
        template = ChatTemplate.load(model_dir)
        assert template.render([]) == expected
        assert not template.is_default
    (model_dir / "chat_template.jinja").write_text("file\n")
    assert ChatTemplate.load(model_dir).render([]) == "file"


def test_the_identity_is_that_of_the_source() -> None:
    assert ChatTemplate("a", {}).identity == ChatTemplate("a", TOKENS).identity
    assert ChatTemplate("a", {}).identity != ChatTemplate("b", {}).identity


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x | nonsense }}",
        "{% for m in messages recursive %}{{ loop([]) }}{% endfor %}",
        "x" * 300_000,
        "{{ " + "(" * 5_000 + ")" * 5_000 + " }}",
    ],
)
def test_a_template_that_does_not_compile_makes_the_model_unusable(source: str) -> None:
    with pytest.raises(ModelUnusable, match="chat template"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ namespace(__x=1) }}",
        "{% set ns = namespace() %}{% set ns._Namespace__attrs = 1 %}",
        "{{ lipsum(1) }}",
        "{% include 'x' %}",
        "{{ undefined_name.field }}",
        "{{ messages['x'] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ [1] | tojson(indent=1000) }}",
        "{{ 'x'.encode() }}",
        "{{ messages | tojson(default=1) }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt\.chat"):
        ChatTemplate(source, {}).render(CHAT)


GROW = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}GROW{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'a' }}",
        "{{ 2 ** 1000000000 }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(a)1000000000d' % {'a': 1} }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ ('{0}' * 10000).format('a' * 1000000) }}",
        "{{ (('a' * 100000).split('a')) | join('x' * 100000) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(100000) %}" + "x" * 200_000 + "{% endfor %}",
        GROW.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
        GROW.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
        GROW.replace("GROW", "{% set ns.x = ns.x.replace('a', 'aaaa') %}"),
        GROW.replace("GROW", "{% set ns.x = ns.x | replace('a', 'aaaa') %}"),
        GROW.replace("GROW", "{% set ns.x = ns.x.join(ns.x) %}"),
        GROW.replace("GROW", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
        GROW.replace("GROW", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        GROW.replace("GROW", "{% set ns.x = [ns.x, ns.x] %}"),
        GROW.replace("GROW", "{% set ns.x = (ns.x, ns.x) %}"),
        GROW.replace("GROW", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
        GROW.replace("GROW", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    ],
)
def test_growth_is_stopped_before_it_takes_memory(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(CHAT)
    assert time.monotonic() - started < 2 * budget.RENDER_MAX_S


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x.count('aab') }}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "RENDER_MAX_S", 0.3)
    template = ChatTemplate(source, {})
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"takes more than|more text"):
        template.render(CHAT)
    assert time.monotonic() - started < 1.5


def test_a_long_conversation_fits_the_budget() -> None:
    chat = [("user" if turn % 2 == 0 else "assistant", "word " * 100) for turn in range(2_001)]
    assert len(ChatTemplate(ALTERNATING, TOKENS).render(chat)) > 1_000_000
