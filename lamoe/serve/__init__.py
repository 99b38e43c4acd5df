"""The HTTP room: an OpenAI-compatible server over the engine. Nothing outside this folder knows HTTP."""
