"""The engine: continuous batching, scheduling, sampling and grammars over one paged cache."""
