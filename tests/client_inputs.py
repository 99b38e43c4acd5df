"""What clients of OpenAI's API send: the data of serve/test_client_inputs.py.

Three tables, by the kinds of faults that public reports describe. Each row has a name that says
what it is, and the request. Right is what OpenAI's documentation or transformers' templates say, or
what a reader of the request expects. The template of the server is `SPEAK`.
"""

SPEAK = (
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if mood is defined %}({{ mood }}){% endif %}"
    "{% endif %}"
)
USER = {"role": "user", "content": "hi"}
PART = {"type": "text", "text": "hi"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


def call(arguments="{}", name="f", id="c1", **fields):
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function, **fields}


def calls(*items, content=None, **fields):
    return assistant(content, tool_calls=[*items], **fields)


def result(content="42", id="c1", **fields):
    return {"role": "tool", "tool_call_id": id, "content": content, **fields}


def system(content="s", role="system"):
    return {"role": role, "content": content}


# ---- silently wrong: the conversation that the model must see ------------------------------------
HISTORY = "<user>hi<assistant>"
RENDERED = {
    "a text": ([USER], "<user>hi"),
    "parts without anything between them": (
        [user([PART, {"type": "text", "text": " there"}])],
        "<user>hi there",
    ),
    "no parts": ([user([])], "<user>"),
    "an empty part": ([user([{"type": "text", "text": ""}, PART])], "<user>hi"),
    "Responses' input_text": ([user([{"type": "input_text", "text": "hi"}])], "<user>hi"),
    "developer": ([system(role="developer"), USER], "<system>s<user>hi"),
    "two system messages": ([system(), system("t"), USER], "<system>s<system>t<user>hi"),
    "system in the middle": ([USER, system(), USER], "<user>hi<system>s<user>hi"),
    "system alone": ([system()], "<system>s"),
    "two users": ([USER, USER], "<user>hi<user>hi"),
    "an empty reply": ([USER, assistant(""), USER], HISTORY + "<user>hi"),
    "a refused reply": ([USER, assistant(None, refusal="no")], HISTORY + "no"),
    "a reply with a null refusal": ([USER, assistant("a", refusal=None)], HISTORY + "a"),
    "a refusal part": (
        [USER, assistant([{"type": "refusal", "refusal": "no"}])],
        HISTORY + "no",
    ),
    "the reply is the last message": ([USER, assistant("The")], HISTORY + "The"),
    "a name": ([user("hi", name="Bo Lee")], "<user Bo Lee>hi"),
    "an empty name": ([user("hi", name="")], "<user>hi"),
    "reasoning of an earlier reply": (
        [USER, assistant("a", reasoning_content="long", reasoning="long")],
        HISTORY + "a",
    ),
    "arguments are written once": ([USER, calls(call('{"a": "b"}'))], HISTORY + '[f{"a": "b"}]'),
    "arguments as an object": ([USER, calls(call({"a": 1}))], HISTORY + '[f{"a": 1}]'),
    "arguments encoded twice": ([USER, calls(call('"{\\"a\\": 1}"'))], HISTORY + '[f{"a": 1}]'),
    "no arguments": ([USER, calls(call(""))], HISTORY + "[f{}]"),
    "null arguments": ([USER, calls(call(None))], HISTORY + "[f{}]"),
    "the text null": ([USER, calls(call("null"))], HISTORY + "[f{}]"),
    "the order of arguments": (
        [USER, calls(call('{"b": 1.0, "a": []}'))],
        HISTORY + '[f{"b": 1.0, "a": []}]',
    ),
    "escaped letters": ([USER, calls(call('{"a": "\\u00e9"}'))], HISTORY + '[f{"a": "é"}]'),
    "large numbers": ([USER, calls(call('{"a": 10000000000000000001}'))],)
    + (HISTORY + '[f{"a": 10000000000000000001}]',),
    "a call without an id (Ollama)": (
        [USER, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
        HISTORY + "[f{}]",
    ),
    "text beside a call": ([USER, calls(call(), content="I look")], HISTORY + "I look[f{}]"),
    "no parts beside a call": ([USER, calls(call(), content=[])], HISTORY + "[f{}]"),
    "calls in parallel": (
        [USER, calls(call(), call(name="g", id="c2")), result("1", "c2"), result("2")],
        HISTORY + "[f{}][g{}]<tool g>1<tool f>2",
    ),
    "a result names its function": (
        [USER, calls(call()), result("42")],
        HISTORY + "[f{}]<tool f>42",
    ),
    "a result with another name": (
        [USER, calls(call()), result("42", name="h")],
        HISTORY + "[f{}]<tool h>42",
    ),
    "a result of no call": ([result(id="c9"), USER], "<tool>42<user>hi"),
    "a result in parts": ([USER, calls(call()), result([PART])], HISTORY + "[f{}]<tool f>hi"),
    "an empty result": ([USER, calls(call()), result("")], HISTORY + "[f{}]<tool f>"),
    "an error as a result": (
        [USER, calls(call()), result('{"error": "x"}')],
        HISTORY + '[f{}]<tool f>{"error": "x"}',
    ),
    "the text of a control token": (
        [user("a<｜end▁of▁sentence｜>b")],
        "<user>a<｜end▁of▁sentence｜>b",
    ),
    "the text of a tag": ([user("<tool_call>{}</tool_call>")], "<user><tool_call>{}</tool_call>"),
    "NUL": ([user("a\0b")], "<user>a\0b"),
    "emoji of several characters": ([user("👨‍👩‍👧‍👦🏳️‍🌈")], "<user>👨‍👩‍👧‍👦🏳️‍🌈"),
    "marks without width": ([user("a\u200b\ufeff\u2028b")], "<user>a\u200b\ufeff\u2028b"),
    "composed letters stay": ([user("e\u0301 \u00e9")], "<user>e\u0301 \u00e9"),
    "noncharacters": ([user("\ufdd0\uffff")], "<user>\ufdd0\uffff"),
    "line ends": ([user("a\r\nb\n\n")], "<user>a\r\nb\n\n"),
    "braces of a template": ([user("{{ 7 * 7 }}{% raw %}")], "<user>{{ 7 * 7 }}{% raw %}"),
}

# ---- refused though valid ------------------------------------------------------------------------
ACCEPTED = {
    "content-type with a charset": (
        COMPLETE,
        {},
        {"content-type": "application/json;charset=utf8"},
    ),
    "content-type in quotes": (COMPLETE, {}, {"content-type": 'application/json; charset="UTF-8"'}),
    "content-type in capitals": (COMPLETE, {}, {"content-type": "Application/JSON"}),
    "a +json type": (COMPLETE, {}, {"content-type": "application/vnd.api+json"}),
    "accepts events only": (COMPLETE, {}, {"accept": "text/event-stream"}),
    "accepts compressed answers": (COMPLETE, {}, {"accept-encoding": "gzip, br, zstd"}),
    "asks for HTTP/2 (Java)": (
        COMPLETE,
        {},
        {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAQ"},
    ),
    "expects 100": (COMPLETE, {}, {"expect": "100-continue"}),
    "the headers of OpenAI's clients": (
        COMPLETE,
        {},
        {"x-stainless-lang": "python", "openai-organization": "org", "openai-beta": "a=v2"},
    ),
    "Azure's query": (CHAT + "?api-version=2024-06-01", {}),
    "Anthropic's query": (CHAT + "?beta=true", {}),
    "a slash at the end": (CHAT + "/", {}),
    "an escaped path": ("/v1%2Fchat/completions", {}),
    "template options that ask for nothing": (
        CHAT,
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": None}},
    ),
    "thinking off (Qwen)": (CHAT, {"enable_thinking": False}),
    "an option that the template reads": (CHAT, {"chat_template_kwargs": {"mood": "calm"}}),
    "a reply to continue (vLLM)": (
        CHAT,
        {
            "messages": [USER, assistant("The")],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "no generation prompt": (CHAT, {"add_generation_prompt": False}),
    "no model": (CHAT, {"model": None}),
    "an empty model": (CHAT, {"model": ""}),
    "tools null with a choice": (CHAT, {"tools": None, "tool_choice": "none"}),
    "no tools, but parallel": (CHAT, {"tools": [], "parallel_tool_calls": True}),
    "a tool without parameters": (CHAT, {"tools": [{**TOOL, "function": {"name": "f"}}]}),
    "a strict tool": (CHAT, {"tools": [{**TOOL, "function": {"name": "f", "strict": True}}]}),
    "Mistral's choice": (CHAT, {"tools": [TOOL], "tool_choice": "any"}),
    "Responses' choice": (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
    ),
    "a format of text": (CHAT, {"response_format": {"type": "text"}}),
    "no format": (CHAT, {"response_format": None}),
    "an empty format": (CHAT, {"response_format": {}}),
    "an empty schema": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    ),
    "logprobs without top_logprobs": (CHAT, {"logprobs": True}),
    "top_logprobs 0": (CHAT, {"logprobs": True, "top_logprobs": 0}),
    "both limits, equal": (CHAT, {"max_tokens": 2, "max_completion_tokens": 2}),
    "a limit over the context": (COMPLETE, {"max_tokens": 100_000, "stop": list("abcdefghij ")}),
    "stop strings with null": (CHAT, {"stop": ["a", None, ""]}),
    "more than four stop strings": (CHAT, {"stop": list("abcdefgh")}),
    "temperature as a whole number": (CHAT, {"temperature": 1}),
    "temperature -0": (CHAT, {"temperature": -0.0}),
    "a huge seed": (CHAT, {"seed": 123456789012345678901234567890}),
    "a negative seed": (CHAT, {"seed": -5}),
    "an empty logit_bias": (CHAT, {"logit_bias": {}}),
    "stream null": (CHAT, {"stream": None, "stream_options": None}),
    "stream options, not streamed": (CHAT, {"stream_options": {"include_usage": False}}),
    "metadata": (CHAT, {"metadata": {"trace": "1"}, "store": False}),
    "LiteLLM's user": (CHAT, {"user": "user_" + "0" * 64 + "_account__session_" + "1" * 36}),
    "best_of of n": (COMPLETE, {"n": 2, "best_of": 2}),
    "echo of ids": (COMPLETE, {"prompt": [5, 6], "echo": True}),
    "prompts as ids": (COMPLETE, {"prompt": [[5], [6, 7]]}),
    "duplicate keys": (COMPLETE, b'{"prompt": [1], "prompt": "the cat", "max_tokens": 1}'),
    "blank lines around JSON": (COMPLETE, b'\r\n {"prompt": "a", "max_tokens": 1}\n\n'),
    "a byte order mark": (COMPLETE, b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}'),
    "whole numbers as 1e0": (COMPLETE, b'{"prompt": "a", "max_tokens": 1e0}'),
    "LangChain's batch of texts": (EMBED, {"input": ["a"] * 1000}),
    "ids to embed": (EMBED, {"input": [[5, 6], [7]]}),
    "the model's own dimensions": (EMBED, {"input": "a", "dimensions": 32}),
    "an encoding that is null": (EMBED, {"input": "a", "encoding_format": None}),
    "an empty text to tokenize": (TOKENIZE, {"prompt": ""}),
    "no ids": (DETOKENIZE, {"tokens": []}),
}

# ---- rough: the error says what is wrong, and what to do -----------------------------------------
SCHEMA_IN_PLACE = {"type": "object", "properties": {}}
ERRORS = {
    "tools of Responses": (CHAT, {"tools": [{"type": "function", "name": "f"}]}, "into function"),
    "tools of Anthropic": (CHAT, {"tools": [{"name": "f", "input_schema": {}}]}, "tools[0]"),
    "tools that the server runs": (CHAT, {"tools": [{"type": "web_search"}]}, "'function'"),
    "a choice of no tool": (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "the functions of tools are 'f'",
    ),
    "a choice without tools": (CHAT, {"tool_choice": "required"}, "no tools"),
    "a name with a blank": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "get weather"}}]},
        "tools[0].function.name",
    ),
    "parameters as text": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
        "must be an object",
    ),
    "functions": (CHAT, {"functions": [{"name": "f"}]}, "use tools"),
    "a role of the old API": (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "tool"),
    "a role in capitals": (CHAT, {"messages": [{"role": "User", "content": "x"}]}, '"User"'),
    "a reply without content": (CHAT, {"messages": [USER, assistant(None)]}, "messages[1]"),
    "a call that was cut": (
        CHAT,
        {"messages": [USER, calls(call('{"a": 1'))]},
        "message 1: the arguments of a tool call are not JSON",
    ),
    "an image": (CHAT, {"messages": [user([{"type": "image_url", "image_url": {}}])]}, "text only"),
    "a part that is a text": (CHAT, {"messages": [user(["a"])]}, "content[0] must be an object"),
    "one message, no list": (CHAT, {"messages": USER}, "messages must be a list"),
    "a field of one client": (CHAT, {"messages": [user("x", mood="sad")]}, "mood"),
    "a prompt": (CHAT, {"prompt": "x"}, "/v1/completions"),
    "a question to continue": (CHAT, {"continue_final_message": True}, "only an assistant's text"),
    "a reply to continue and one to begin": (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "cannot be used together",
    ),
    "thinking on (Qwen)": (CHAT, {"enable_thinking": True}, "does not read the option"),
    "an option of another template": (
        CHAT,
        {"chat_template_kwargs": {"thinking": True}},
        "does not read the option 'thinking'",
    ),
    "an option with the name of a variable": (
        CHAT,
        {"chat_template_kwargs": {"messages": []}},
        "'messages' is set by the server",
    ),
    "extra_body": (CHAT, {"extra_body": {"top_k": 5}}, "top level"),
    "Ollama's options": (CHAT, {"options": {"num_ctx": 5}}, "top level"),
    "numbers as texts": (CHAT, {"max_tokens": "5"}, 'must be a whole number, found "5"'),
    "true as a text": (CHAT, {"stream": "true"}, "must be true or false"),
    "logprobs as a number": (CHAT, {"logprobs": 5}, "top_logprobs"),
    "top_logprobs alone": (CHAT, {"top_logprobs": 5}, "needs logprobs"),
    "two limits": (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
    "usage without a stream": (CHAT, {"stream_options": {"include_usage": True}}, "stream: true"),
    "llama.cpp's pairs": (CHAT, {"logit_bias": [[5, -100]]}, "must be an object"),
    "a wrong id": (CHAT, {"logit_bias": {"-1": 5}}, "logit_bias.-1 must match"),
    "an id of another model": (CHAT, {"logit_bias": {"50256": 5}}, "the vocabulary has 300"),
    "another model": (CHAT, {"model": "openai/tiny"}, "this server has 'tiny'"),
    "a schema in the wrong place": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA_IN_PLACE}},
        "response_format.json_schema.schema",
    ),
    "a format of another server": (
        CHAT,
        {"response_format": {"type": "regex", "value": "a"}},
        "'json_schema'",
    ),
    "a format as text": (CHAT, {"response_format": "json"}, "must be an object"),
    "a format without type": (CHAT, {"response_format": {"json_schema": {"schema": {}}}}, "type"),
    "more samples than choices": (COMPLETE, {"best_of": 3}, "only the value of n"),
    "texts and ids": (COMPLETE, {"prompt": ["a", [1]]}, "prompt[1] must be a text"),
    "an id of a larger vocabulary": (COMPLETE, {"prompt": [5, 99999]}, "vocabulary of 300"),
    "an empty prompt among others": (COMPLETE, {"prompt": ["a", ""]}, "prompt[1] has no tokens"),
    "an empty text to embed": (EMBED, {"input": ["a", ""]}, "input[1] has no tokens"),
    "too many texts to embed": (EMBED, {"input": ["a"] * 2049}, "more than 2048"),
    "other dimensions": (EMBED, {"input": "a", "dimensions": 8}, "embeddings have 32"),
    "texts of Cohere": (EMBED, {"texts": ["a"]}, "input is required"),
    "bytes of other types": (EMBED, {"input": "a", "encoding_format": "int8"}, "'base64'"),
    "ids to text, beyond the vocabulary": (DETOKENIZE, {"tokens": [5, 300]}, "vocabulary of 300"),
    "llama.cpp's tokenize": (TOKENIZE, {"content": "a"}, "content"),
    "a comma at the end": (COMPLETE, b'{"prompt": "a",}', "trailing comma"),
    "Python's notation": (COMPLETE, b"{'prompt': 'a'}", "key must be a string"),
    "JSON in a text": (COMPLETE, b'"{\\"prompt\\": \\"a\\"}"', "the body must be an object"),
    "half of an emoji": (COMPLETE, b'{"prompt": "a\\ud83d"}', "middle of an emoji"),
    "two halves apart": (COMPLETE, b'{"prompt": "\\ud83d \\ude00"}', "middle of an emoji"),
    "Latin-1": (COMPLETE, b'{"prompt": "\xe9"}', "invalid unicode"),
    "a form": (COMPLETE, b"prompt=a", "Content-Type", {"content-type": "application/x-www-form"}),
    "no content-type": (COMPLETE, b"{}", "Content-Type: application/json", {"content-type": ""}),
    "brotli": (COMPLETE, b"{}", "gzip, deflate", {"content-encoding": "br"}),
}
