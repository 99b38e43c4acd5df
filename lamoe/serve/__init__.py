"""The HTTP server: an OpenAI-compatible API over the engine, and a web page.

No other package knows about HTTP.
"""
