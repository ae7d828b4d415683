"""From a question to an answer: search, merge, apply, generate, restore.

In the order that data takes: query, retrieval, atom_cache, adapter, generation, filling, pipeline; batching, streaming.
"""
