"""The same server inside vLLM: its API process searches and weighs, its worker merges the atoms as a LoRA adapter.

    VLLM_PLUGINS=regrad REGRAD_COLLECTION=docs vllm serve MODEL --enable-lora --max-lora-rank 16

vLLM 0.32 finds both halves by entry points: `vllm.endpoint_plugins` (`endpoint`) and `vllm.general_plugins` (`worker`).
"""
