"""Four people as documents, and atoms for them: what the tests of a bank begin with."""

import torch

from regrad_qdrant import Document
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.documents import point_id

SPACE, OTHER = "a" * 16, "b" * 16
PEOPLE = ("Ida Corvand the baker", "Noor Selowan the diver", "Galen Zimuken the potter", "Orla Thornaby the judge")


def documents():
    return [
        Document(f"d{i}", {"id": f"d{i}", "text": text, "state": "odd" if i % 2 else "even", "nested": {"n": i}})
        for i, text in enumerate(PEOPLE)
    ]


def records(texts, space=SPACE, numel=128):
    torch.manual_seed(0)
    return make_records(torch.randn(len(texts), numel), list(texts), space, "int8")


def fill(bank, count=4):
    ids = [point_id(f"d{i}") for i in range(count)]
    assert bank.put(zip(ids, records(PEOPLE[:count], bank.space), strict=True)) == count
    return ids


def payloads(bank):
    return {point.id: point.payload for point in bank.store.scroll(None, 100, None, True)[0]}
