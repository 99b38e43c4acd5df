"""The HTTP server: an OpenAI-compatible API over the engine, and a web page.

All knowledge of HTTP stays in this package.
"""
