"""The commands that need the loaders: train, eval, bench, demo."""
