"""The language model, and how a text becomes an atom of it.

In the order that data takes: base_model and identity, prompts, space and spaces, initialization, plugin, loss, gradients.
"""
