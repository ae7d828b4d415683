"""The Gradient Bank: documents with their vectors and atoms in a Qdrant collection.

In the order that data takes: documents, corpus, layouts, embed, stores, bank, ingest; then upkeep, async_bank, migrate.
"""
