"""What makes and measures meta-initializations: data, training, evaluation, bench, and their commands (cli)."""
