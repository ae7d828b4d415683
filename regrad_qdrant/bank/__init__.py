"""The Gradient Bank: documents with their vectors and atoms in a Qdrant collection.

In the order that data takes: documents, corpus, layouts, stores, embed, place, collection, upkeep, writing, bank,
ingest. async_bank is the same for asyncio; migrate copies a collection from one store to another.
"""
