"""The command `regrad-qdrant`.

app puts the commands together; bank and ask have them; options and console are what they share.
"""
