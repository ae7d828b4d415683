"""The meta-initialization: φ₀, the step sizes α, the basis U, and everything that a gradient depends on.

On disk it is an ordinary PEFT adapter folder with two files more:

    adapter_config.json, adapter_model.safetensors   φ₀: `PeftModel.from_pretrained` reads them by itself
    regrad.json                                      space, base model, loss, merge rule, card
    regrad.safetensors                               α (one a tensor of the space, or one a number) and the basis U
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant.atoms.merge import MergeRule
from regrad_qdrant.atoms.record import decode_sum
from regrad_qdrant.errors import DataError, InitializationError, WrongModelError
from regrad_qdrant.model.identity import PEFT_PREFIX, BaseModel, is_coarse
from regrad_qdrant.model.prompts import PromptFormat
from regrad_qdrant.model.space import AtomSpace, LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regrad_qdrant.atoms.record import Record

FORMAT, BYTES_FORMAT = 1, 2  # the second where U is in bytes
LEVELS = 127  # of a byte, on either side of zero
SCALES = ".basis_scales"
SHIPPED = Path(__file__).parents[1] / "initializations"
OF_CLONE = Path(__file__).parents[2] / "initializations"  # further ones, which a clone has and the package has not


@dataclass(frozen=True)
class MetaInitialization:
    """φ₀, α and U with the settings they were trained for.

    `modules` holds the LoRA tensors of each adapted layer, by its name in the base model; `step_sizes` one number for
    each tensor of the atom space (DESIGN: α), or a tensor of its shape.
    """

    base: BaseModel
    kind: str  # of the atom space: a key of SPACES
    lora_alpha: int
    modules: dict[str, LoraModule]
    step_sizes: dict[str, float | Tensor]
    max_length: int  # tokens of a document that its gradient sees
    merge: MergeRule = MergeRule()
    passages_in_prompt: bool = False  # trained for ReGrad + ICL
    rank_stabilized: bool = False  # s = lora_alpha / √r (rsLoRA) instead of lora_alpha / r
    card: dict[str, Any] = field(default_factory=dict)  # recipe, seed, data, scores
    prompt: PromptFormat = PromptFormat()  # that it was trained with

    def __post_init__(self) -> None:
        if self.kind not in SPACES:
            raise InitializationError(f"atom space {self.kind!r} is not one of {', '.join(SPACES)}")
        if not self.modules:
            raise InitializationError("the meta-initialization adapts no layer")
        expected, found = set(self.space.shapes), set(self.step_sizes)
        if expected != found:
            raise InitializationError(
                f"need one step size for each of the {len(expected)} tensors of the space; missing "
                f"{sorted(expected - found)[:3]}, unknown {sorted(found - expected)[:3]}"
            )
        for name, size in self.step_sizes.items():
            if isinstance(size, float | int):
                good, has = math.isfinite(size), str(size)
            else:
                good = size.shape == self.space.shapes[name] and bool(size.isfinite().all())
                has = f"a tensor of {tuple(size.shape)} for one of {self.space.shapes[name]}, or not finite in part"
            if not good:
                raise InitializationError(f"step sizes must be finite, one a tensor or one a number; {name} is {has}")

    @property
    def rank(self) -> int:
        return next(iter(self.modules.values())).rank

    @property
    def layers(self) -> list[int]:
        """The numbers of the adapted transformer layers, rising."""
        return sorted({int(part) for name in self.modules for part in name.split(".") if part.isdigit()})

    @cached_property
    def space(self) -> AtomSpace:
        """The atom space over this initialization's own tensors."""
        return SPACES[self.kind](self.modules)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of everything that a gradient depends on. The step sizes are not among it."""
        digest = hashlib.sha256()
        settings = {
            "base": self.base.digest,
            "space": self.kind,
            "scaling": {name: module.scaling for name, module in self.modules.items()},
            "loss": "token-mean next-token cross-entropy",
            "max_length": self.max_length,
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(_tensors(self.modules).items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_model(self, model: nn.Module) -> None:
        """Refuse a base model other than the one that this initialization was trained for.

        Raises:
            WrongModelError: with the digests of both.
        """
        if not self.base.fits(model):
            bits = " in float32 or bfloat16 (nothing is noted to know it by in fewer bits)"
            raise WrongModelError(
                f"this initialization was trained for {self.base.name} (weights {self.base.digest}); the model given "
                f"has weights {BaseModel.of(model, '').digest}. Load that base model"
                f"{bits if is_coarse(model) and not self.base.sample else ''}, or train an initialization for yours: "
                "regrad-qdrant train"
            )

    @property
    def trained_codecs(self) -> tuple[str, ...]:
        """The codecs that its atoms were read through in training; others may change an update beyond use."""
        recipe = self.card.get("recipe")
        codecs = recipe.get("codecs") if isinstance(recipe, Mapping) else None
        return tuple(codecs or ("fp32",))

    @property
    def has_full_step_sizes(self) -> bool:
        """Whether some tensor has a step size for every number."""
        return not all(isinstance(size, float | int) for size in self.step_sizes.values())

    def flat_step_sizes(self) -> Tensor:
        """α, one for each number of an atom: (numel,) float32."""
        import torch

        sizes = {name: torch.as_tensor(size).float().cpu() for name, size in self.step_sizes.items()}
        return torch.cat([sizes[name].expand(shape).flatten() for name, shape in self.space.shapes.items()])

    def with_step_sizes(
        self, step_sizes: Mapping[str, float | Tensor], merge: MergeRule | None = None
    ) -> MetaInitialization:
        """The same initialization with other step sizes; its fingerprint, so every stored atom, stays valid."""
        return replace(self, step_sizes=dict(step_sizes), merge=merge or self.merge)

    def adapter_tensors(self, records: Sequence[Record], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """φ' = φ₀ − α ⊙ Σ wᵢ·g(dᵢ) as the tensors of an ordinary LoRA adapter, by the names that PEFT's files have.

        No model is needed. The tensors are the caller's own, float32 on the processor; wᵢ = 1 by default.

        Raises:
            RecordError: if a record can't be used.
        """
        total = decode_sum(records, weights, self.fingerprint, self.space.layout)
        updates = self.space.to_update(self.space.unflatten(-self.flat_step_sizes() * total))
        found = {}
        for name, module in self.modules.items():
            for part, tensor in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
                update = updates.get(f"{name}.{part}")
                merged = tensor.detach().clone() if update is None else tensor.detach() + update
                found[f"{PEFT_PREFIX}{name}.{part}.weight"] = merged.contiguous()
        return found

    def export(
        self,
        folder: Path | str,
        records: Sequence[Record],
        weights: Sequence[float] | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write the merged update as an ordinary PEFT LoRA adapter, for a server that loads adapters at run time.

        `PeftModel.from_pretrained(base, folder)` then runs as the model does inside `Adapter.applied`, without this
        library.

        Args:
            base_model: the base model's name where the adapter is served, if it has another one there.

        Raises:
            RecordError: if a record can't be used; nothing is written then.
        """
        from safetensors.torch import save_file

        tensors, folder = self.adapter_tensors(records, weights), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = self.peft_config() | ({} if base_model is None else {"base_model_name_or_path": base_model})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    # -- on disk -------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the PEFT adapter folder; an existing one is replaced file by file."""
        import torch
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter, own = {}, {"step_sizes": self.flat_step_sizes()}
        if not self.has_full_step_sizes:
            own["step_sizes"] = torch.tensor([self.step_sizes[name] for name in self.space.shapes])
        for name, module in self.modules.items():
            adapter[f"{PEFT_PREFIX}{name}.lora_A.weight"] = _compact(module.lora_a)
            adapter[f"{PEFT_PREFIX}{name}.lora_B.weight"] = _compact(module.lora_b)
            if module.basis is not None:
                own |= _stored_basis(name, module.basis)
        regrad = {
            "format": BYTES_FORMAT if any(name.endswith(SCALES) for name in own) else FORMAT,
            "fingerprint": self.fingerprint,
            "base": asdict(self.base),
            "space": self.kind,
            "max_length": self.max_length,
            "merge": asdict(self.merge),
            "passages_in_prompt": self.passages_in_prompt,
            **({"prompt": differences} if (differences := self.prompt.differences()) else {}),
            "card": self.card,
        }
        with tempfile.TemporaryDirectory(dir=folder) as beside:  # written whole before any takes the place of another
            made = Path(beside)
            config = json.dumps(self.peft_config(), indent=1) + "\n"
            (made / "adapter_config.json").write_text(config, encoding="utf-8")
            save_file(adapter, made / "adapter_model.safetensors")
            save_file(own, made / "regrad.safetensors")
            text = json.dumps(regrad, indent=1, ensure_ascii=False) + "\n"
            (made / "regrad.json").write_text(text, encoding="utf-8")
            for file in made.iterdir():
                file.replace(folder / file.name)

    def peft_config(self) -> dict[str, Any]:
        """`adapter_config.json` of a LoRA adapter on this initialization's modules."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.name,
            "r": self.rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": list(self.modules),
            **({"use_rslora": True} if self.rank_stabilized else {}),
        }

    @classmethod
    def load(cls, name_or_folder: str | Path) -> MetaInitialization:
        """Load a folder, or a shipped initialization by its name.

        Raises:
            InitializationError: if there is none, if a file is damaged, or if the tensors do not hash to the
                fingerprint written beside them.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = folder_of(name_or_folder)
        try:
            regrad = json.loads((folder / "regrad.json").read_text(encoding="utf-8"))
            adapter_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            adapter = load_file(folder / "adapter_model.safetensors")
            own = load_file(folder / "regrad.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise InitializationError(f"{folder}: can't read the meta-initialization: {error}") from error
        if not isinstance(regrad, dict) or not isinstance(adapter_config, dict):
            raise InitializationError(f"{folder}: regrad.json and adapter_config.json are objects; restore the folder")
        if regrad.get("format") not in (FORMAT, BYTES_FORMAT):
            raise InitializationError(
                f"{folder}: format {regrad.get('format')!r}, this version reads formats {FORMAT} and {BYTES_FORMAT}"
            )
        try:
            initialization = cls._from_files(regrad, adapter_config, adapter, own)
        except (KeyError, TypeError, ValueError, DataError) as error:
            raise InitializationError(f"{folder}: the meta-initialization is incomplete: {error!r}") from error
        if initialization.fingerprint != regrad["fingerprint"]:
            raise InitializationError(
                f"{folder}: the tensors hash to {initialization.fingerprint}, regrad.json says "
                f"{regrad['fingerprint']}; the folder was changed or copied in part: restore it from its source"
            )
        return initialization

    @classmethod
    def _from_files(
        cls, regrad: dict[str, Any], adapter_config: dict[str, Any], adapter: dict[str, Tensor], own: dict[str, Tensor]
    ) -> MetaInitialization:
        rank_stabilized = bool(adapter_config.get("use_rslora"))
        scaling = scaling_of(adapter_config["lora_alpha"], adapter_config["r"], rank_stabilized)
        modules = {
            name: LoraModule(
                lora_a=adapter[f"{PEFT_PREFIX}{name}.lora_A.weight"].float(),
                lora_b=adapter[f"{PEFT_PREFIX}{name}.lora_B.weight"].float(),
                scaling=scaling,
                basis=_read_basis(name, own),
            )
            for name in adapter_config["target_modules"]
        }
        space, sizes = SPACES[regrad["space"]](modules), own["step_sizes"]
        step_sizes: dict[str, float | Tensor] = dict(space.unflatten(sizes)) if len(sizes) == space.numel else {}
        return cls(
            base=BaseModel(**regrad["base"]),
            kind=regrad["space"],
            lora_alpha=adapter_config["lora_alpha"],
            modules=modules,
            step_sizes=step_sizes or dict(zip(space.shapes, sizes.tolist(), strict=True)),
            max_length=regrad["max_length"],
            merge=MergeRule(**regrad["merge"]),
            passages_in_prompt=regrad["passages_in_prompt"],
            rank_stabilized=rank_stabilized,
            card=regrad["card"],
            prompt=PromptFormat.of(regrad.get("prompt", {})),
        )


def scaling_of(lora_alpha: float, rank: int, rank_stabilized: bool = False) -> float:
    """s, what the products of a LoRA's tensors are multiplied by."""
    return lora_alpha / (math.sqrt(rank) if rank_stabilized else rank)


def _tensors(modules: Mapping[str, LoraModule]) -> dict[str, Tensor]:
    found = {}
    for name, module in modules.items():
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = module.lora_a, module.lora_b
        if module.basis is not None:
            found[f"{name}.basis"] = module.basis
    return found


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in float16 where that holds its numbers exactly, as training rounds them; else as it is."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    half = tensor.to(torch.float16)
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def in_bytes(basis: Tensor) -> Tensor:
    """U (d_out, p) rounded to 255 levels of each column, in which a file holds it as one byte a number."""
    return _decoded(*_coded(basis))


def _coded(basis: Tensor) -> tuple[Tensor, Tensor]:
    """A byte for each number, and the float16 step of each column (p,)."""
    import torch

    basis = basis.detach().float().cpu()
    scales = (basis.abs().amax(0) / LEVELS).to(torch.float16)
    codes = (basis / scales.float().clamp(min=1e-12)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8).contiguous(), scales


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.float()


def _stored_basis(name: str, basis: Tensor) -> dict[str, Tensor]:
    """U in bytes where they hold its numbers exactly (`in_bytes`), else as `_compact`."""
    import torch

    codes, scales = _coded(basis)
    if torch.equal(_decoded(codes, scales), basis.detach().float().cpu()):
        return {f"{name}.basis": codes, f"{name}{SCALES}": scales}
    return {f"{name}.basis": _compact(basis)}


def _read_basis(name: str, own: Mapping[str, Tensor]) -> Tensor | None:
    if f"{name}.basis" not in own:
        return None
    basis, scales = own[f"{name}.basis"], own.get(f"{name}{SCALES}")
    return basis.float() if scales is None else _decoded(basis, scales)


def folder_of(name_or_folder: str | Path) -> Path:
    """Where an initialization is: a folder, or a shipped one by its name.

    Raises:
        InitializationError: if there is none.
    """
    for folder in (Path(name_or_folder), SHIPPED / str(name_or_folder), OF_CLONE / str(name_or_folder)):
        if (folder / "regrad.json").is_file():
            return folder
    known = [sorted(folder.name for folder in place.iterdir()) for place in (SHIPPED, OF_CLONE) if place.is_dir()]
    raise InitializationError(
        f"no meta-initialization at {name_or_folder!s}: neither a folder with regrad.json nor a known name "
        f"({', '.join(name for names in known for name in names) or 'none shipped'})"
    )
