"""Chat templates: as transformers renders them, and never beyond bounds of time and memory."""

import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CHATML = """{%- if tools %}
{{- '<|im_start|>system\\n' -}}
{%- for tool in tools %}{{- '\\n' -}}{{ tool | tojson(indent=2) }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1, text='') %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}
{%- endfor %}
{% macro head(role) -%}<|im_start|>{{ role }}{%- endmacro %}
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ bos_token or '' }}{% endif -%}
{{ head(message.role) ~ '\\n' ~ (message.content | trim) ~ '<' ~ loop.index ~ '/' ~ loop.length ~ '>' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content.split(' ')[0] }}{% endgeneration %}{% endif %}
{{- '%s:%03d' % (message.role, loop.revindex) + ',' * 3 }}{{ '{:>5}'.format(loop.last) }}
{%- if not loop.last %}{{- '\\n' }}{% else %}{% break %}{% endif %}
{%- else %}none
{%- endfor %}
{% for key, value in {'a': 1, 'b': [1, 2]}.items() %}{{ key }}{{ value }}{% endfor %}
{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ ns.last }}{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""  # noqa: E501
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <b>this</b>? é 数字 "},
    {"role": "assistant", "content": "It is a test"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "'é'"}}]
OPTIONS = (
    {"add_generation_prompt": True},
    {"tools": TOOLS},
    {"continue_final_message": True},
    {"add_generation_prompt": True, "enable_thinking": False},
)
RENDER = f"""
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE({{"a": 0}}, [])), bos_token="<s>"
)
for options in {OPTIONS!r}:
    print(repr(tokenizer.apply_chat_template(
        {MESSAGES!r}, chat_template={CHATML!r}, tokenize=False, **options
    )))
"""


@pytest.fixture(scope="module")
def render():
    from parscale_core.checkpoint.chat_template import bound_templates

    bound_templates()
    backend = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")

    def render(template: str, **options) -> str:
        return tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, **options
        )

    return render


def test_texts_are_those_of_transformers(render):
    """In a process of its own, nothing has changed how transformers compiles templates."""
    theirs = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True)
    ours = "".join(f"{render(CHATML, **options)!r}\n" for options in OPTIONS)
    assert theirs.stdout == ours and ours.count("<|im_start|>") > 12, theirs.stderr


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * (10**10) }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * (10**10) }}",
        "{{ 2 ** (10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ ('a' * 4000000).replace('a', 'b' * 4000000) }}",
        "{{ ('a' * 4000000) | replace('a', 'b' * 4000000) }}",
        "{{ (['a' * 4000000] * 4000000) | join }}",
        "{{ lipsum(10**9) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% set n=namespace(s='a') %}{% for i in 60 * 'x' %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n=namespace(s='a') %}{% for i in 60 * 'x' %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('roles\nmust alternate') }}",
        "{{ messages[9].content.text }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
        "{{ messages | nosuchfilter }}",
    ],
)  # fmt: skip
def test_what_explodes_or_fails_ends_in_one_line(render, template):
    started = time.monotonic()
    with pytest.raises(ValueError, match="the chat template") as error:
        render(template)
    assert "\n" not in str(error.value) and time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% set n=namespace(s=[1]) %}{% for i in 60 * 'x' %}{% set n.s = [n.s, n.s] %}{% endfor %}"
        "{{ n.s }}",
    ],
)  # fmt: skip
def test_what_never_ends_is_ended(render, template):
    started = time.monotonic()
    with pytest.raises(ValueError, match="the chat template"):
        render(template)
    assert time.monotonic() - started < 20


def test_a_long_conversation_is_no_explosion(render):
    assert len(render("{{ 'word ' * 200000 }}")) == 1_000_000
