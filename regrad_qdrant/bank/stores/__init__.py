"""The few operations that a bank needs of a collection, over each engine.

base says what they are; client has them over a QdrantClient (queries: its models; failures: when it fails), edge over
an embedded Edge shard; opening chooses.
"""
