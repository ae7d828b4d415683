"""Question-answering data, from wherever it comes to the episodes that training draws.

folders, hub and facts read or invent data sets; cloze makes further questions of passages; episodes draws from all.
"""
