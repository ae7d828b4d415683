"""The measurements behind the documentation's numbers.

figures is what they share; gradients, query, training and growth measure speed; atoms and merge measure quality.
"""
