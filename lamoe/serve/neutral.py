"""Fields that clients send although this server does not implement them.

Many clients write every field of an API into every request, with null, an empty value or the
default for what they do not use. Such a field asks for nothing, so the request is answered as
without it. A value that asks for something is refused by name. The tables below say which values
ask for nothing, and what to do about the others. Names that stand in no table are refused, unless
their value is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from lamoe.serve.errors import quoted

# {name: (what to do, *values that ask for nothing)}. null, "", [], {} ask for nothing anywhere, and
# so does false, unless true is among the values. A type stands for all of its values.
Table = Mapping[str, tuple]
ANY = object
NUMBER = (int, float)

# Fields of all requests, by the API that has them.
REQUEST: Table = {
    # OpenAI
    "store": ("no responses are stored here",),
    "metadata": ("it labels stored responses, which do not exist here", dict),
    "service_tier": ("there is one tier; leave it out", "auto", "default"),
    "modalities": ("the output is text only", ["text"]),
    "prediction": ("there are no predicted outputs; leave it out",),
    "audio": ("the output is text only; leave it out",),
    "reasoning_effort": ("there is no control of reasoning; leave it out", "none"),
    "verbosity": ("there is no control of verbosity; ask for it in a message", "medium"),
    "web_search_options": ("there is no web search; leave it out",),
    # Every prefix is cached, whatever these say.
    "prompt_cache_key": ("prefixes are cached without it; leave it out", str),
    "prompt_cache_retention": ("prefixes are cached without it; leave it out", str),
    "prompt_cache_options": ("prefixes are cached without it; leave it out", dict),
    "safety_identifier": ("it is a text for the provider's logs", str),
    "moderation": ("there is no moderation; leave it out",),
    "schema": ("write it into response_format.json_schema.schema",),
    "text": ("write its format into response_format", {"format": {"type": "text"}}),
    "functions": ("use tools",),
    "function_call": ("use tools and tool_choice", "none", "auto"),
    "input_type": ("texts of all kinds are embedded alike; leave it out",),
    "dimensions": ("embeddings have the model's own size; leave it out",),
    # what the client libraries unpack before they send, and users of plain HTTP copy
    "extra_body": ("write its fields at the top level of the request",),
    "extra_headers": ("send them as HTTP headers",),
    "extra_query": ("leave it out",),
    # OpenRouter, DeepSeek, Anthropic, Mistral, xAI, Azure
    "reasoning": (
        "there is no control of reasoning; leave it out",
        {"effort": "none"},
        {"enabled": False},
        {"exclude": True},
    ),
    # Reasoning is never separated from the text, so there is nothing to include or leave out.
    "include_reasoning": ("leave it out", True, False),
    "thinking": ("there is no control of reasoning; leave it out", {"type": "disabled"}),
    "enable_thinking": ("there is no control of reasoning; leave it out",),
    "provider": ("there is one provider; leave it out",),
    "models": ("there is one model; use model",),
    "route": ("there is one model; leave it out", "fallback"),
    "transforms": ("prompts are not changed; leave it out",),
    "plugins": ("there are no plugins; leave it out",),
    "top_a": ("use min_p", 0),
    "system": ("write a message with role system",),
    "stop_sequences": ("use stop",),
    "max_output_tokens": ("use max_completion_tokens",),
    "safe_prompt": ("write a message with role system",),
    "random_seed": ("use seed",),
    "prompt_mode": ("leave it out",),
    "search_parameters": ("there is no web search; leave it out", {"mode": "off"}),
    "deferred": ("leave it out",),
    "data_sources": ("there are no data sources; leave it out",),
    # vLLM and SGLang
    "use_beam_search": ("there is no beam search; leave it out",),
    "length_penalty": ("there is no beam search; leave it out", 1),
    "early_stopping": ("there is no beam search; leave it out",),
    "stop_token_ids": ("use stop",),
    "stop_regex": ("use stop",),
    "bad_words": ("use logit_bias with token ids",),
    "allowed_token_ids": ("use regex or grammar",),
    "logits_processors": ("leave it out",),
    "custom_logit_processor": ("leave it out",),
    "include_stop_str_in_output": ("append the stop string yourself",),
    "no_stop_trim": ("append the stop string yourself",),
    "prompt_logprobs": ("use echo with logprobs in /v1/completions",),
    "skip_special_tokens": ("special tokens are left out of the text; leave it out", True),
    "spaces_between_special_tokens": ("leave it out", True, False),
    "continue_final_message": ("it belongs to /v1/chat/completions",),
    "truncate_prompt_tokens": ("shorten the prompt yourself",),
    "documents": ("write them into a message",),
    "chat_template": ("the template of the model folder is used; leave it out",),
    "chat_template_kwargs": ("the template gets no options; leave it out",),
    "mm_processor_kwargs": ("the input is text only; leave it out",),
    "media_io_kwargs": ("the input is text only; leave it out",),
    "guided_decoding_backend": ("there is one backend for structured output", str),
    "guided_whitespace_pattern": ("leave it out",),
    "priority": ("requests run in order of arrival; leave it out", 0),
    "request_id": ("the id of a request is in its header x-request-id", str),
    "rid": ("the id of a request is in its header x-request-id", str),
    "return_tokens_as_token_ids": ("leave it out",),
    "return_token_ids": ("send the text to /tokenize",),
    "return_hidden_states": ("leave it out",),
    "kv_transfer_params": ("leave it out",),
    "vllm_xargs": ("leave it out",),
    "separate_reasoning": ("leave it out", True, False),
    "stream_reasoning": ("leave it out", True, False),
    "thinking_token_budget": ("there is no control of reasoning; leave it out",),
    "lora_path": ("there are no adapters; leave it out",),
    "session_params": ("leave it out",),
    "ebnf": ("write the grammar in Lark and send it as grammar",),
    # llama.cpp
    "n_predict": ("use max_tokens", -1),
    "n_keep": ("nothing is cut from prompts; leave it out", *NUMBER),
    "n_discard": ("nothing is cut from prompts; leave it out", *NUMBER),
    "n_indent": ("leave it out", 0),
    "n_probs": ("use logprobs", 0),
    "min_keep": ("leave it out", 0),
    # A prompt's cached prefix gives the same tokens, so this changes no output.
    "cache_prompt": ("prefixes are always cached", True, False),
    "id_slot": ("leave it out", -1),
    "slot_id": ("leave it out", -1),
    "typical_p": ("use min_p", 1),
    "tfs_z": ("use min_p", 1),
    "top_n_sigma": ("use min_p", 0, -1),
    "dynatemp_range": ("use temperature", 0),
    "dynatemp_exponent": ("use temperature", *NUMBER),  # has no effect: the range is 0
    "xtc_probability": ("leave it out", 0),
    "xtc_threshold": ("leave it out", *NUMBER),  # has no effect: the probability is 0
    "mirostat": ("use top_p or min_p", 0),
    "mirostat_mode": ("use top_p or min_p", 0),
    "mirostat_tau": ("leave it out", *NUMBER),  # no effect without mirostat
    "mirostat_eta": ("leave it out", *NUMBER),
    "dry_multiplier": ("use repetition_penalty", 0),
    "dry_base": ("leave it out", *NUMBER),  # these have no effect: the multiplier is 0
    "dry_allowed_length": ("leave it out", *NUMBER),
    "dry_penalty_last_n": ("leave it out", *NUMBER),
    "dry_sequence_breakers": ("leave it out", list),
    "repeat_penalty": ("use repetition_penalty", 1),
    "repeat_last_n": ("leave it out", *NUMBER),  # no effect without repeat_penalty
    "penalize_nl": ("leave it out",),
    "samplers": ("the order of the samplers is fixed; leave it out",),
    "t_max_predict_ms": ("set a timeout in your client", 0),
    "image_data": ("the input is text only; leave it out",),
    "timings_per_token": ("leave it out",),
    "return_progress": ("leave it out",),
    "return_tokens": ("send the text to /tokenize",),
    "response_fields": ("leave it out",),
    "post_sampling_probs": ("leave it out",),
    "lora": ("there are no adapters; leave it out",),
    "grammar_lazy": ("leave it out",),
    "reasoning_format": ("reasoning is not separated from the text", "none", "auto"),
    "thinking_forced_open": ("leave it out",),
    "parse_tool_calls": ("tool calls are always parsed; leave it out", True),
    # Ollama and text-generation-inference
    "options": ("write its fields at the top level of the request",),
    "keep_alive": ("the model stays loaded", ANY),
    "think": ("there is no control of reasoning; leave it out",),
    "raw": ("use /v1/completions",),
    "template": ("the template of the model folder is used; leave it out",),
    "context": ("send the whole conversation as messages",),
    "images": ("the input is text only; leave it out",),
    "max_new_tokens": ("use max_tokens",),
    "do_sample": ("temperature 0 switches sampling off; leave it out", True),
    "return_full_text": ("use echo in /v1/completions",),
    "details": ("leave it out",),
    "decoder_input_details": ("use echo with logprobs in /v1/completions",),
    "watermark": ("leave it out",),
    "truncate": ("shorten the prompt yourself",),
    "adapter_id": ("there are no adapters; leave it out",),
}

# Notes that clients keep on the messages of a conversation. They are not part of the prompt.
MESSAGE: Table = {
    "id": ("a message has no id", ANY),
    "type": ("leave it out", "message"),
    "status": ("leave it out", str),
    "index": ("leave it out", *NUMBER),
    "metadata": ("leave it out", dict),
    "annotations": ("leave it out", list),  # what an earlier reply cited
    "parsed": ("leave it out", ANY),  # the content of an earlier reply as an object
    "provider_specific_fields": ("leave it out", dict),
    # Reasoning of earlier replies: models are trained without it in their prompt.
    "reasoning": ("leave it out", str),
    "reasoning_content": ("leave it out", str),
    "reasoning_details": ("leave it out", list),
    # what a client's own record of a reply holds
    "created": ("leave it out", ANY),
    "created_at": ("leave it out", ANY),
    "timestamp": ("leave it out", ANY),
    "model": ("leave it out", str),
    "object": ("leave it out", str),
    "finish_reason": ("leave it out", str),
    "usage": ("leave it out", dict),
    "weight": ("leave it out", *NUMBER),  # of training data
    "thinking": ("leave it out", str),
    "thinking_blocks": ("leave it out", list),
    "audio": ("the input is text only; leave it out",),
    "images": ("the input is text only; leave it out",),
    "function_call": ("use tool_calls",),
    "tool_name": ("leave it out", str),
    "is_error": ("write the error into content",),
    "prefix": ("set continue_final_message of the request",),
    "cache_control": ("prefixes are cached without it; leave it out",),
    "experimental_attachments": ("the input is text only; leave it out",),
}
PART: Table = {
    "prompt_cache_breakpoint": ("prefixes are cached without it; leave it out", dict),
    "id": ("leave it out", ANY),
    "annotations": ("leave it out", list),
    "cache_control": ("prefixes are cached without it; leave it out",),
    "citations": ("leave it out", list),
}
# Kinds of parts that APIs know, beside text.
PARTS = frozenset(
    "image_url input_image image input_audio audio audio_url video_url video file input_file "
    "document tool_use tool_result thinking redacted_thinking reasoning".split()
)
TOOL_CALL: Table = {
    "index": ("leave it out", *NUMBER),  # its place in a stream
    "custom": ("use a function",),
    "extra_content": ("leave it out", dict),
    "provider_specific_fields": ("leave it out", dict),
    "cache_control": ("prefixes are cached without it; leave it out",),
}
FUNCTION_CALL: Table = {"parsed_arguments": ("leave it out", ANY)}
TOOL: Table = {
    "cache_control": ("prefixes are cached without it; leave it out",),
    "custom": ("use a function",),
    "defer_loading": ("leave it out",),
    # OpenAI's Responses API and Anthropic's have these fields of a function beside its type.
    **dict.fromkeys(
        ("name", "description", "parameters", "input_schema", "strict"),
        ("write it into function",),
    ),
}
STREAM_OPTIONS: Table = {
    # A defence against observers of encrypted traffic, which this server leaves to the proxy.
    "include_obfuscation": ("leave it out", True, False),
    "continuous_usage_stats": ("include_usage reports the usage at the end",),
}
STRUCTURED: Table = {
    "structural_tag": ("use json, regex, choice or grammar",),
    "disable_fallback": ("leave it out", True, False),
    "disable_any_whitespace": ("white space follows a fixed pattern; leave it out",),
    "disable_additional_properties": ("write additionalProperties: false into the schema",),
    "whitespace_pattern": ("white space follows a fixed pattern; leave it out",),
}


def is_empty(value: Any) -> bool:
    """Whether a value asks for nothing in any field: null, "", [] or {}."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def drop(
    data: dict[str, Any],
    optional: Collection[str],
    fields: Collection[str],
    kept_empty: Collection[str],
    table: Table,
) -> dict[str, Any]:
    """Return the fields of a JSON object that ask for something.

    Args:
        data: an object of a request.
        optional: names of implemented fields whose empty values mean that they are absent.
        fields: names of all implemented fields.
        kept_empty: optional fields where only null means that they are absent.
        table: what else is known.

    Raises:
        PydanticCustomError: "unsupported", if a field of the table asks for something.
    """
    kept = {}
    for name, value in data.items():
        if name in fields:
            absent = is_empty(value) if name not in kept_empty else value is None
            if name not in optional or not absent:
                kept[name] = value
        elif name not in table:
            if not is_empty(value):
                kept[name] = value  # pydantic refuses it by name
        elif not _asks_nothing(value, table[name][1:]):
            raise PydanticCustomError(
                "unsupported",
                "this server does not support {found} here: {advice}",
                {"field": name, "found": quoted(value), "advice": table[name][0]},
            )
    return kept


def _asks_nothing(value: Any, values: tuple) -> bool:
    if is_empty(value) or (value is False and True not in values):
        return True
    return any(
        isinstance(value, v) and (v is ANY or not isinstance(value, bool))
        if isinstance(v, type)
        else value == v and isinstance(value, bool) == isinstance(v, bool)
        for v in values
    )
