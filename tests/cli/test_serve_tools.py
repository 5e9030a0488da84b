"""Calls of tools, in the formats that models write them, through the packages that clients use."""

import json

import anthropic
import openai
import pytest
from helpers.byte_tokenizers import byte_level
from helpers.scripted import ScriptedEngine
from helpers.serving import CHAT, post, running
from parscale_core.serve.settings import Settings

# What the templates of these families write, of their own past calls and of what they ask for.
TEMPLATES = {
    "qwen": "<tool_call>\n{'name': tool_call.name, 'arguments': tool_call.arguments}\n</tool_call>",
    "coder": "<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>",
    "mistral": "[TOOL_CALLS] [{'name': call.name, 'arguments': call.arguments}]",
    "llama": '<|python_tag|>{"name": function name, "parameters": dictionary of arguments}',
    "granite": "write <|tool_call|> followed by a JSON list of tools",
    "phi": "<|tool_call|>[{'name': name, 'arguments': arguments}]<|/tool_call|>",
    "plain": "",
}
BODY = (
    "{%% if tools %%}%s{{ tools | tojson }}{%% endif %%}{%% for m in messages %%}"
    # As Hermes' templates want it.
    "{%% if m.role == 'tool' and not m.name %%}{{ raise_exception('no name') }}{%% endif %%}"
    "<{{ m.role }}>{{ m.content }}{%% for call in m.tool_calls or [] %%}"
    "{{ call.id | length }}{{ call.function | tojson }}{%% endfor %%}{%% endfor %%}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "how": {"anyOf": []}},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
OSLO, ROME = {"city": "Oslo", "days": 3}, {"city": "Rome é\n", "how": [True, None]}


def mistral(*calls) -> str:
    return "".join(f"[TOOL_CALLS]weather[ARGS]{json.dumps(call)}" for call in calls)


def objects(*calls, key="arguments") -> list[str]:
    return [json.dumps({"name": "weather", key: call}) for call in calls]


# Of a family: what is said, its content, and the arguments of its calls.
SAID = [
    ("qwen", f"Well. <tool_call>\n{objects(OSLO)[0]}\n</tool_call>", "Well. ", [OSLO]),
    (
        "qwen",
        "".join(f"<tool_call>{call}</tool_call>" for call in objects(OSLO, ROME)),
        "",
        [OSLO, ROME],
    ),
    ("qwen", "<tool_call>" + objects(OSLO)[0], "", [OSLO]),  # the end was forgotten
    ("plain", f"<tool_call>[{', '.join(objects(OSLO, ROME))}]</tool_call>", "", [OSLO, ROME]),
    (
        "coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "I look.\n",
        [OSLO],
    ),
    (
        "coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome é\n\n</parameter>\n"
        "<parameter=how>\n[true, null]\n</parameter>\n</function>\n<function=weather>\n"
        "<parameter=city>\n12\n</parameter>\n<parameter=other>\n1 < 2\n</parameter>\n"
        "<parameter=how>\nTrue\n</parameter>\n</function>\n</tool_call>",
        "",
        [ROME, {"city": "12", "other": "1 < 2", "how": True}],
    ),
    ("mistral", f"[TOOL_CALLS] [{', '.join(objects(OSLO, ROME))}]", "", [OSLO, ROME]),
    ("mistral", "So: " + mistral(OSLO, ROME), "So: ", [OSLO, ROME]),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{json.dumps(OSLO)}", "", [OSLO]),
    ("llama", objects(OSLO, key="parameters")[0], "", [OSLO]),
    ("llama", "\n" + "; ".join(objects(OSLO, ROME, key="parameters")), "", [OSLO, ROME]),
    ("llama", "<|python_tag|>" + objects(ROME, key="parameters")[0], "", [ROME]),
    ("granite", f"<|tool_call|>[{', '.join(objects(OSLO, ROME))}]", "", [OSLO, ROME]),
    ("phi", f"<|tool_call|>[{objects(OSLO)[0]}]<|/tool_call|>", "", [OSLO]),
]  # fmt: skip
# Of a family, what is no call, however much it looks like one: it stays text, all of it.
NO_CALLS = [
    ("qwen", "a < b, <tool_call, <tool_call>{not JSON}</tool_call> and so on"),
    ("qwen", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("qwen", '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>'),
    ("qwen", '<tool_call>{"name": 5}</tool_call>'),
    ("qwen", "<tool_call>" + "[" * 5000),
    ("qwen", '{"name": "weather", "arguments": {}}'),
    ("coder", "<tool_call><function=weather><parameter=days>3</function></tool_call>"),
    ("coder", "<tool_call><function=weather></function> and more</tool_call>"),
    ("mistral", "[TOOL_CALLS]weather[ARGS]{cut"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", "[TOOL"),
    ("llama", '{"city": "Oslo", "days": 3}'),
    ("llama", '{"name": "weather", "parameters": {}} is how one asks'),
    ("llama", "Hello {"),
    ("llama", "<|python_tag|>weather.call(city='Oslo')"),
    ("granite", "<|tool_call|>weather(city='Oslo')"),
]


def tokenizer(family: str):
    special = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call|>")
    return byte_level(*special, template=BODY % TEMPLATES[family])


@pytest.fixture(scope="module")
def servers():
    """One for each family, which says what the last message is."""
    opened, servers = [], {}
    try:
        for family in TEMPLATES:
            engine = ScriptedEngine(tokenizer(family), lambda text: text.rpartition("<user>")[2])
            opened.append(running(engine, settings=Settings(max_tokens=1 << 13)))
            servers[family] = opened[-1].__enter__()
        yield servers
    finally:
        for one in opened:
            one.__exit__(None, None, None)


@pytest.fixture
def clients(servers):
    def clients(family: str):
        url = servers[family].url
        return (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0),
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0),
        )

    return clients


@pytest.mark.parametrize(("family", "said", "content", "calls"), SAID)
def test_calls_through_chat(clients, family, said, content, calls):
    client, _ = clients(family)
    messages = [{"role": "user", "content": said}]
    asked = {"model": "tiny", "messages": messages, "tools": [TOOL], "max_tokens": 2000}
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (client.chat.completions.create(**asked).choices[0], streamed):
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "") == content
        found = choice.message.tool_calls
        assert [call.function.name for call in found] == ["weather"] * len(calls)
        assert [json.loads(call.function.arguments) for call in found] == calls
        assert len({call.id for call in found}) == len(calls)
    # The calls go back to the model, with what came of them; Mistral's templates want short ids.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in found]
    messages += [choice.message.model_dump(exclude_none=True, exclude={"parsed"}), *results]
    again = client.chat.completions.create(
        model="tiny", messages=[*messages, {"role": "user", "content": "Hi"}], max_tokens=9
    )
    assert again.choices[0].message.content == "Hi"


@pytest.mark.parametrize(("family", "said", "content", "calls"), SAID)
def test_calls_through_responses(clients, family, said, content, calls):
    client, _ = clients(family)
    tools = [{"type": "function", "strict": None} | TOOL["function"]]
    asked = {"model": "tiny", "input": said, "tools": tools, "max_output_tokens": 2000}
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    for answer in (client.responses.create(**asked), streamed):
        assert answer.status == "completed" and answer.output_text == content
        found = [item for item in answer.output if item.type == "function_call"]
        assert [call.name for call in found] == ["weather"] * len(calls)
        assert [json.loads(call.arguments) for call in found] == calls
    given = [{"role": "user", "content": "weather?"}, *(call.model_dump() for call in found)]
    given += [
        {"type": "function_call_output", "call_id": c.call_id, "output": "sun"} for c in found
    ]
    given += [{"role": "user", "content": "Hi"}]
    again = client.responses.create(model="tiny", input=given, max_output_tokens=9)
    assert again.output_text == "Hi"


@pytest.mark.parametrize(("family", "said", "content", "calls"), SAID)
def test_calls_through_messages(clients, family, said, content, calls):
    _, client = clients(family)
    messages = [{"role": "user", "content": said}]
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    asked = {"model": "tiny", "messages": messages, "tools": tools, "max_tokens": 2000}
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for answer in (client.messages.create(**asked), streamed):
        assert answer.stop_reason == "tool_use"
        assert "".join(b.text for b in answer.content if b.type == "text") == content
        found = [block for block in answer.content if block.type == "tool_use"]
        assert [block.name for block in found] == ["weather"] * len(calls)
        assert [block.input for block in found] == calls
    results = [{"type": "tool_result", "tool_use_id": b.id, "content": "sun"} for b in found]
    messages += [{"role": "assistant", "content": answer.content}]
    messages += [{"role": "user", "content": [*results, {"type": "text", "text": "Hi"}]}]
    again = client.messages.create(model="tiny", messages=messages, max_tokens=9)
    assert again.content[0].text == "Hi"


@pytest.mark.parametrize(("family", "said"), NO_CALLS)
def test_what_is_no_call_is_text(clients, family, said):
    client, claude = clients(family)
    messages = [{"role": "user", "content": said}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 6000}
    chat = client.chat.completions.create(**asked, tools=[TOOL]).choices[0]
    assert (chat.message.content, chat.finish_reason) == (said, "stop")
    assert chat.message.tool_calls is None
    chunks = client.chat.completions.create(**asked, tools=[TOOL], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    answer = claude.messages.create(**asked, tools=tools)
    assert (answer.content[0].text, answer.stop_reason) == (said, "end_turn")


def test_without_tools_nothing_is_a_call(servers):
    said = objects(OSLO, key="parameters")[0]
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        body = {"messages": [{"role": "user", "content": said}], "max_tokens": 99} | fields
        answer = post(servers["llama"], CHAT, body)
        assert answer.text() == said


def test_schemas_that_tell_nothing(servers):
    said = next(said for family, said, *_ in SAID if family == "coder")
    for parameters in ({"properties": []}, {"properties": {"days": 5}}, {"properties": None}, {}):
        tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
        body = {"messages": [{"role": "user", "content": said}], "tools": [tool]}
        (call,) = post(servers["coder"], CHAT, body).json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": "3"}


def test_past_calls_that_no_template_can_read(servers):
    wrong = ["x", {"arguments": "{}"}, {"name": "weather", "arguments": 5}, None]
    for call in [{"id": "1"}, *({"id": "1", "function": function} for function in wrong)]:
        body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
        answer = post(servers["qwen"], CHAT, body)
        assert answer.status == 400 and "tool_calls.0" in answer.error()
