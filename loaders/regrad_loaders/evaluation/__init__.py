"""The same questions in several modes, side by side: plan, evaluate, scores, results, plots."""
