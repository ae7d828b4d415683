"""From a question to an answer: search, merge, apply, generate, restore.

In the order that data takes: atom_cache, adapter, generation, filling, pipeline.
"""
