import subprocess
import sys

import regrad_qdrant


def test_public_names():
    assert regrad_qdrant.__all__ == [
        "Adapter", "Answer", "AsyncGradientBank", "Bm25", "DenseEmbedder", "Document", "GradientBank",
        "GradientComputer", "Hit", "Layout", "MergeRule", "MetaInitialization", "Prompt", "PromptFormat", "Query",
        "ReGrad", "Record", "RegradError", "load_base_model",
    ]  # fmt: skip
    for name in regrad_qdrant.__all__:
        assert getattr(regrad_qdrant, name).__name__ == name


def test_import_is_cheap_and_leaves_torch_alone():
    code = (
        "import sys, time; t = time.perf_counter(); import regrad_qdrant; s = time.perf_counter() - t;"
        "print(s, [m for m in ('torch', 'transformers', 'qdrant_client', 'peft') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "123"
    ]
    assert min(float(run.split()[0]) for run in runs) < 0.3
    assert all(run.strip().endswith("[]") for run in runs)


def test_every_error_descends_from_one_root():
    from regrad_qdrant import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.RegradError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
