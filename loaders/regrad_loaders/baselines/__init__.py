"""What ReGrad is compared with, where that is more than another prompt: training on the corpus (CPT), an adapter for
each document (PRAG), passages as keys and values, passages cut short.
"""
