"""Text in and out: tokenizer, chat templates, tool calls."""
