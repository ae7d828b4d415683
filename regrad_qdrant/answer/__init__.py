"""From a question to an answer: search, merge, apply, generate, restore.

In the order that data takes: query, retrieval, filling, atom_cache, adapter; decoding, with generation, or with spans
and grounding; pipeline, batching, streaming.
"""
