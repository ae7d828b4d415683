"""The few operations that a bank needs of a collection, over each engine.

base says what they are; client has them over a QdrantClient, edge over an embedded Edge shard; opening chooses.
"""
