"""What an atom is once it is numbers: how it becomes bytes, a payload value, and a weight beside others.

In the order that data takes: codec, codecs (numbers ↔ bytes), record (bytes ↔ payload value), merge (scores → weights).
"""
