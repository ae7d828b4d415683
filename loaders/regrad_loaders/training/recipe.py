"""A recipe: one YAML file that says everything about a meta-training run."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.merge import RULES
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import STYLES, Style
from regrad_qdrant.model.spaces.registry import SPACES


@dataclass(frozen=True)
class Source:
    """One data set of the mixture: a folder, a dataset of the Hugging Face Hub, a folder of questions with the passages
    that were retrieved for them, or a world of invented facts."""

    weight: float
    folder: str | None = None  # below the recipe's data_dir
    hub: str | None = None  # as `datasets.load_dataset` takes it
    config: str | None = None  # of a dataset that has several
    data_aug: str | None = None  # as `data.augmented` reads it, below the recipe's data_dir
    fields: dict[str, str] = field(default_factory=dict)  # where its rows hold what a question needs (hub.FIELDS)
    split: str = "train"
    types: tuple[str, ...] = ()  # only questions of these types; empty: all
    facts: dict[str, int] | None = None  # {"people": …, "seed": …}
    cloze: int = 0  # at most so many further questions of each gold passage, made of its own sentences
    style: Style = "short"  # of the answers: `sentence` takes the open questions that can be answered with one

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", tuple(self.types))
        if [self.folder, self.hub, self.facts, self.data_aug].count(None) != 3:
            raise DataError(
                "a source of data is either a `folder`, a dataset of the `hub`, a folder of `data_aug` or a world of "
                "`facts`"
            )
        name = self.folder or self.hub or self.data_aug or "facts"
        if not isinstance(self.split, str):
            raise DataError(f"{name}: a split is a name, found {self.split!r}")
        if re.search(r"(?<![a-z])(dev|test|val|eval)|^\s*all\s*$", self.split.lower()):
            raise DataError(f"{name}: the split {self.split!r} is for evaluation, or holds one, never for training")
        if self.style not in STYLES:
            raise DataError(f"the style {self.style!r} is not one of {', '.join(STYLES)}")
        if not isinstance(self.cloze, int) or self.cloze < 0:
            raise DataError(f"cloze counts questions of each gold passage, 0 or more, found {self.cloze!r}")
        if self.cloze and self.style == "sentence":
            raise DataError("cloze questions are answered with a word: not in a source of the style sentence")
        object.__setattr__(self, "weight", _checked("weight", "float", self.weight))
        if self.weight < 0:
            raise DataError(f"a source's weight is a share, 0 or more, found {self.weight}")
        known = {"people", "seed", "questions_per_person"}
        if self.facts is not None and not {"people", "seed"} <= set(self.facts) <= known:
            raise DataError(f"facts are {{people: …, seed: …}}, perhaps with questions_per_person; found {self.facts}")


@dataclass(frozen=True)
class Optimizer:
    """AdamW's settings beyond the rates."""

    beta1: float = 0.9
    beta2: float = 0.95
    warmup_from: float = 0.0  # of the rate, where warm-up begins; 0: its first step is one part of it

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise DataError(f"the optimizer's {name} is at least 0 and below 1, found {value!r}")


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; the names are those of the YAML file."""

    name: str
    base_model: str
    # plug-in parameters and atom space
    space: str
    rank: int
    lora_alpha: int
    targets: tuple[str, ...]
    layers: tuple[int, int] | str  # first and last adapted layer, or upper: the upper half of the model's
    basis_rank: int = 0  # p of the core space
    max_length: int = 256  # tokens of a document at ingestion
    merge: str = "margin"
    temperature: float | None = None  # τ of the merge rule at first; None: that of `start`, or 0.2
    # The first of what begins fresh (`start` has its own); None: calibrated. {kind: raw, initial: 0.01} sets the kind.
    step_size: float | None = None
    step_size_kind: str = "log"  # log α is learned, so that α keeps its sign; raw: α itself, at learning_rate
    # where it starts, and what it learns
    start: str | None = None  # an initialization to go on from, shipped or a folder; None: fresh
    averaged_with: str | None = None  # a second one of the same shape: training begins with the mean of the two
    averaged_share: float = 0.5  # of the second in that mean
    learn: str = "all"  # or step_sizes: log α and log τ alone, so that every stored atom stays valid
    prompt: str | None = None  # JSON file of a prompt format; None: that of `start`, or the default
    passages_in_prompt: float = 0.0  # of this share of the questions; true, of all: for regrad+icl
    atoms: bool = True  # false: plain fine-tuning of φ₀ on the answers, the baseline that ReGrad is compared with
    step_size_mode: str = "tensor"  # α: one for each tensor, `one` for all, `full`: one for each number; `fixed`
    order: int = 2  # derivatives through the inner step: 2 all; 1 its projections alone, faster
    codecs: tuple[str, ...] = ("fp32",)  # one is drawn for each episode, and its atoms are read through it
    # data
    data: tuple[Source, ...] = ()
    data_dir: str = "../shared/data"
    answers: str = "any"  # of a question's answers one at random is learned; first: always the first
    target_end: str | None = None  # what is learned after an answer, and ends one; None: as the prompt format has it
    passage_tokens: int = 112  # longer passages are cut to a window in training, as those over max_length are
    # episodes
    passages: int = 16  # of an episode; "retrieved" sets retrieved, and each episode is one question
    retrieved: bool = False  # a question meets what BM25 returns for it, gold or not, and nothing else
    passage_label: bool = False  # passages carry in front what they have in a prompt ("Passage 1: ")
    questions_per_passage: int = 2
    top_k: tuple[int, ...] = (1, 2, 3, 5)
    passage_batch: int | None = None  # passages whose second order is in memory at once; None: as many as fit
    accumulate: int = 1  # episodes of one step, on each process
    shards: int = 1  # processes that hold one base model's weights together, where it is too large for each
    contrast: int = 0  # questions of an episode whose answer is also set against other spans (`training.contrast`)
    contrast_weight: float = 0.5  # of that loss beside the answers' own
    # optimisation
    steps: int = 300
    warmup: int = 20
    learning_rate: float = 1e-3  # of φ₀ and U
    step_size_learning_rate: float = 2e-2  # of log α and log τ
    weight_decay: float = 0.0
    optimizer: Optimizer = Optimizer()
    clip: float = 1.0
    seed: int = 1
    autocast: bool = False  # bf16; pays where the processor multiplies bf16 faster than fp32
    checkpoint_every: int = 20
    evaluate_every: int = 50
    dev_questions: int = 0  # of each source's dev split to evaluate on; 0: on training questions, no best is kept
    select_by: str = "loss"  # the best on dev questions has the lowest loss, or the highest f1 of what it writes
    patience: int = 0  # evaluations without a better dev loss before the run stops; 0: it never does

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, dict):
            object.__setattr__(self, "optimizer", Optimizer(**self.optimizer))
        if isinstance(self.step_size, dict):
            if unknown := sorted(set(self.step_size) - {"kind", "initial"}):
                raise DataError(f"step_size is a number or {{kind: …, initial: …}}, found {', '.join(unknown)} too")
            object.__setattr__(self, "step_size_kind", self.step_size.get("kind", "log"))
            object.__setattr__(self, "step_size", self.step_size.get("initial"))
        if self.passages == "retrieved":
            object.__setattr__(self, "retrieved", True)
            object.__setattr__(self, "passages", max(self.top_k))
        for name in ("targets", "top_k", "codecs"):
            if isinstance(getattr(self, name), str):
                raise DataError(f"{name} is a list, found {getattr(self, name)!r}")
        for setting in fields(self):
            object.__setattr__(self, setting.name, _checked(setting.name, setting.type, getattr(self, setting.name)))
        if self.layers != UPPER and (len(self.layers) != 2 or self.layers[0] > self.layers[1]):
            raise DataError(f"layers are the first and the last adapted layer, or {UPPER}; found {self.layers}")
        if self.space not in SPACES:
            raise DataError(f"space {self.space!r} is not one of {', '.join(SPACES)}")
        if self.merge not in RULES:
            raise DataError(f"merge {self.merge!r} is not one of {', '.join(RULES)}")
        if SPACES[self.space].uses_basis and self.basis_rank < 1:
            raise DataError(f"the {self.space} space needs a basis_rank of at least 1")
        if not self.data:
            raise DataError("the recipe names no data")
        if not any(source.weight for source in self.data):
            raise DataError("every source of the recipe's data has the weight 0: nothing to draw from")
        if self.learn not in ("all", "step_sizes"):
            raise DataError(f"learn {self.learn!r} is neither 'all' nor 'step_sizes'")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise DataError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.select_by == "f1" and not self.dev_questions:
            raise DataError("select_by: f1 needs dev_questions to write answers to")
        if self.retrieved and self.passages_in_prompt and self.passage_label:
            raise DataError("passage_label is of passages that gradients are taken of; in a prompt they have theirs")
        if self.step_size_mode not in ("tensor", "one", "full", "fixed"):
            raise DataError(f"step_size_mode {self.step_size_mode!r} is not one of tensor, one, full, fixed")
        if not 0 <= self.passages_in_prompt <= 1:
            raise DataError(f"passages_in_prompt is a share of the questions, 0 to 1, found {self.passages_in_prompt}")
        if self.contrast < 0 or self.contrast_weight < 0:
            raise DataError("contrast counts questions and contrast_weight is a weight: neither is below 0")
        if self.passage_batch is not None and self.passage_batch < 1:
            raise DataError(f"passage_batch must be at least 1, found {self.passage_batch}")
        if self.step_size == 0:
            raise DataError("a step_size of 0 moves nothing")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise DataError(f"temperature is τ of the merge rule, above 0, found {self.temperature}")
        if not self.top_k or min(self.top_k) < 1:
            raise DataError(f"top_k names the k that questions draw, each at least 1, found {list(self.top_k)}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise DataError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if not self.clip > 0:
            raise DataError(f"clip is the largest norm of a step's gradient, above 0 (.inf: any), found {self.clip}")
        if self.steps == 0 and (self.start is None or self.dev_questions):
            raise DataError("steps: 0 keeps what `start` is, fitted to the recipe: it needs one, and no dev_questions")
        if self.patience and not self.dev_questions:
            raise DataError("patience needs dev_questions to evaluate on")
        if self.learn == "step_sizes" and not self.atoms:
            raise DataError("step sizes can't be learned without atoms")
        if self.order not in (1, 2):
            raise DataError(f"order {self.order} is neither 1 nor 2")
        if self.learn == "step_sizes" and self.start is None:
            raise DataError("step sizes alone can't be learned from nothing: name the initialization in `start`")
        if self.averaged_with is not None and self.start is None:
            raise DataError("averaged_with names the second of two initializations: name the first in `start`")
        if not 0 <= self.averaged_share <= 1:
            raise DataError(f"averaged_share is a share, 0 to 1, found {self.averaged_share}")
        if not self.codecs:
            raise DataError("the recipe names no codec: fp32 is none at all")
        for codec in self.codecs:
            get_codec(codec)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            DataError: for an unknown setting, a missing one, or a value that makes no sense.
        """
        try:
            import yaml
        except ImportError as error:
            raise DataError("reading a recipe needs PyYAML: pip install 'regrad-qdrant[loaders]'") from error
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DataError(f"can't read the recipe {path}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: a recipe is a mapping of settings")
        known = {setting.name for setting in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise DataError(f"{path}: unknown settings {unknown}; known are {sorted(known)}")
        try:
            values["data"] = tuple(Source(**source) for source in values.get("data") or ())
            for name in ("targets", "layers", "top_k", "codecs"):
                if isinstance(values.get(name), list):
                    values[name] = tuple(values[name])
            return cls(**values)
        except TypeError as error:
            raise DataError(f"{path}: {error}") from error

    def of_model(self, name: str) -> Recipe:
        """The same for another base model: the last part of its name goes before the recipe's, and in place of
        `{model}` in what it starts from."""
        short = name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf").lower()
        start = None if self.start is None else self.start.replace("{model}", short)
        return replace(self, base_model=name, name=f"{short}-{self.name}", start=start)

    def fitted_to(self, config: Any) -> Recipe:
        """The same with its layers as numbers, by the base model's configuration."""
        if self.layers != UPPER:
            return self
        count = config.get_text_config().num_hidden_layers
        return replace(self, layers=(count // 2, count - 1))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


UPPER = "upper"
_LEAST = {
    **dict.fromkeys(("rank", "max_length", "passages", "questions_per_passage", "accumulate", "shards"), 1),
    **dict.fromkeys(("checkpoint_every", "evaluate_every"), 1),
    **dict.fromkeys(("steps", "warmup", "dev_questions", "patience", "basis_rank"), 0),
    **dict.fromkeys(("learning_rate", "step_size_learning_rate", "weight_decay"), 0),
    "passage_tokens": 2,  # of one token there is no loss
}
_CHOICES = {"step_size_kind": ("log", "raw"), "answers": ("any", "first"), "select_by": ("loss", "f1")}


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A number as the setting's type has it. YAML reads 1e-3, without a point, as text."""
    if kind == "bool" and not isinstance(value, bool):
        raise DataError(f"{name} is true or false, found {value!r}")
    if kind not in ("int", "float", "int | None", "float | None") or (value is None and kind.endswith("None")):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be a number, found {value!r}") from error
    if kind.startswith("int") and (not math.isfinite(number) or number != int(number)):
        raise DataError(f"{name} must be a whole number, found {value!r}")
    return int(number) if kind.startswith("int") else number
