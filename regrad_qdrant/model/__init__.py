"""The language model, and how a text becomes an atom of it.

In the order that data takes: base_model, identity, prompts, space, spaces, initialization, head, plugin, loss,
gradients.
"""
