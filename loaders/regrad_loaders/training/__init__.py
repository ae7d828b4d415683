"""Meta-training: a recipe's run, from what it starts with to a meta-initialization.

In the order that data takes: recipe, start (average, narrow), meta_learner, trainer, log; released_checkpoint imports.
"""
