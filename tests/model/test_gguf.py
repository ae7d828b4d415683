"""What a GGUF file says of its special tokens goes before what transformers makes of it."""

from pathlib import Path
from types import SimpleNamespace

from gguf import GGUFWriter

from regrad_qdrant.model.base_model import _name_special_tokens


def test_special_tokens_are_those_that_the_file_names(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = ["<pad>", "<|im_start|>", "<|im_end|>"]
    # as transformers 5.17 reads SmolLM2's: what begins a message for what ends an answer
    tokenizer = SimpleNamespace(bos_token="<s>", eos_token="<|im_start|>", convert_ids_to_tokens=words.__getitem__)
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=1), generation_config=SimpleNamespace(eos_token_id=1, bos_token_id=1)
    )

    _name_special_tokens(path, model, tokenizer)

    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<pad>", "<s>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.generation_config.bos_token_id == 1
