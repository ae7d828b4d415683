"""Every architecture that a user may bring, tiny and random, in float32 and bfloat16: the whole way through."""

import pytest
import torch
import transformers
from conftest import TINY, losses_of_steps, state_of, tiny_initialization

from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant import Document, GradientBank, ReGrad
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.answer.query import Query
from regrad_qdrant.answer.running import Row, RunningBatch
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.errors import UnsupportedModelError
from regrad_qdrant.model.gradients import document_losses, pad
from regrad_qdrant.model.head import head_of
from regrad_qdrant.model.plugin import check_layers, plug_in
from regrad_qdrant.model.prompts import Prompt

HEADS = {"head_dim": 8}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": HEADS,
    "Gemma2": HEADS | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "Gemma3": HEADS | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "Phi3": {},
    "Mistral": {"sliding_window": 16},
    "Granite": {"logits_scaling": 6.0, "embedding_multiplier": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},  # whose head has a bias
    "Olmo2": {},
}
FUSED = {"Phi3": ["gate_up_proj", "down_proj"], "Phi": ["fc1", "fc2"]}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
TEXTS = [
    "Ida works as a baker.",
    "The employer of Noor is Amber Mills, and Noor is learning Welsh.",
    "Orla plays chess.",
]
COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}  # of an atom in a batch and alone


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    config_class, model_class = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    config = getattr(transformers, config_class)(**TINY | ARCHITECTURES[name])
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():  # logits large enough that a head which is not followed shows
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    if name == "Phi":
        model.lm_head.bias.data.normal_()
    return model.to(dtype).eval().requires_grad_(False)


def initialization_of(model, name, kind="core"):
    return tiny_initialization(model, kind, targets=FUSED.get(name, ["gate_proj", "up_proj", "down_proj"]))


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def test_our_loss_is_the_models_own(name, dtype, tokenizer):
    model = made(name, dtype)
    ids, mask = pad([tokenizer(text).input_ids for text in TEXTS], 0)
    ours = document_losses(model, ids, mask)
    for row, text in enumerate(TEXTS):
        alone = torch.tensor([tokenizer(text).input_ids])
        theirs = model(input_ids=alone, labels=alone).loss.float()
        torch.testing.assert_close(ours[row], theirs, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4)


def test_batched_atoms_are_those_of_one_text_at_a_time_and_near_those_of_float32(name, dtype, tokenizer):
    def atoms_of(dtype):
        model = made(name, dtype)
        gradients = Adapter(model, initialization_of(model, name), check_model=False).gradients(tokenizer)
        documents = [gradients.encode(text) for text in TEXTS]
        return gradients.atoms(documents), torch.cat([gradients.atoms([document]) for document in documents])

    together, alone = atoms_of(dtype)
    assert float(torch.cosine_similarity(together, alone).min()) >= COSINE[dtype]
    exact, _ = atoms_of(torch.float32)
    assert float(torch.cosine_similarity(together, exact).min()) >= (0.9999 if dtype == torch.float32 else 0.97)


def test_answers_in_a_batch_are_those_one_by_one_and_every_weight_is_as_before(name, dtype, tokenizer, tmp_path):
    model = made(name, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialization = initialization_of(model, name)
    with GradientBank.open(tmp_path, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            assert attach_atoms(bank, regrad.gradients, "sign").atoms_written == len(TEXTS)
            state = state_of(regrad.adapter)
            questions = ["What does Ida do?", "Who employs Noor?", "What does Orla play?"]
            together = [answer.text for answer in regrad.answer_many(questions, top_k=2)]
            alone = [regrad.answer(question, top_k=2).text for question in questions]
            spans = [answer.text for answer in regrad.answer_many(questions, top_k=2, grounded=True)]
            spans_alone = [regrad.answer(question, top_k=2, grounded=True).text for question in questions]
            assert state_of(regrad.adapter) == state
    assert all(any(span in text for text in TEXTS) for span in spans)
    assert dtype != torch.float32 or spans == spans_alone
    # In 16 bits two tokens of a random model may tie: what comes before the first difference is the same.
    for one, other in zip(together, alone, strict=True):
        assert one == other if dtype == torch.float32 else one[:4] == other[:4]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_with_a_recurrent_state_weighs_options_by_whole_passes_and_gives_no_spans(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention", "conv"])
    model = transformers.Lfm2ForCausalLM(config).eval().requires_grad_(False)
    initialization = tiny_initialization(model, targets=["w1", "w2", "w3"])
    asked = [
        Query("Is Ida a baker?", "regrad", "yesno"),
        Query("Which of them plays chess?", "regrad", "choice", ("Ida", "Noor", "a harp")),
    ]
    with GradientBank.open(tmp_path, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
        with ReGrad(model, tokenizer, bank, initialization, on_missing="compute") as regrad:
            together = regrad.answer_many(asked, top_k=2)
            alone = [regrad.answer(a.question, type=a.type, choices=a.choices, top_k=2).text for a in asked]
            assert [answer.text for answer in together] == alone
            assert together[0].text in ("yes", "no") and together[1].text in asked[1].choices
            with pytest.raises(UnsupportedModelError, match="beams can't share"):
                regrad.answer("What is Ida?", grounded=True)
            lengths = (3, 9, 6)
            rows = [
                Row(Prompt("What is Ida?", max_new_tokens=n), tokenizer, regrad.asking, None, False) for n in lengths
            ]
            batch = RunningBatch(regrad.adapter, tokenizer)
            batch.join(rows)
            while batch.rows:  # each leaves when it is done, and one of them cannot leave the state that they share
                batch.leave([row for row in batch.rows if row.finish])
                if batch.rows:
                    batch.step()
            assert [len(row.tokens) for row in rows] == list(lengths)
            for row, length in zip(rows, lengths, strict=True):
                assert row.text == regrad.answer("What is Ida?", mode="init", max_new_tokens=length).text


def test_a_training_step_runs_and_lowers_the_loss(name, dtype, tokenizer):
    model = made(name, dtype)
    learner = MetaLearner(model, initialization_of(model, name), "margin")
    losses = losses_of_steps(learner, tokenizer)
    assert losses[-1] < losses[0]


def test_offloaded_layers_are_refused():
    model = made("Llama")
    initialization = initialization_of(model, "Llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UnsupportedModelError, match="layers.1.mlp.up_proj is offloaded"):
        plug_in(model, initialization)


def test_a_model_that_is_offloaded_in_part_is_told_of_before_its_weights_are_compared():
    model = made("Llama")
    initialization = initialization_of(model, "Llama")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.up_proj.weight is offloaded.*check_model=False"):
        Adapter(model, initialization)


def test_heads_are_found_by_what_they_do():
    found = {name: head_of(made(name)) for name in ARCHITECTURES}
    assert {name for name, head in found.items() if head.cap is not None} == {"Gemma2", "Gemma3"}
    assert found["Granite"].scale == pytest.approx(1 / 6) and found["Cohere"].scale == 0.25
    assert [name for name, head in found.items() if head.bias is not None] == ["Phi"]


def test_a_head_that_nothing_here_follows_is_refused():
    model = made("Llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.roll(1, -1))
    with pytest.raises(UnsupportedModelError, match="scale 1, cap None"):
        head_of(model)


def test_a_model_that_flattens_its_batch_is_followed(tokenizer):
    """As OPT and some mixtures of experts do before their linear layers."""
    atoms = []
    for flat in (False, True):
        model = made("Llama")
        if flat:
            for layer in model.model.layers:
                flatten(layer.mlp)
        gradients = Adapter(model, initialization_of(model, "Llama"), check_model=False).gradients(tokenizer)
        atoms.append(gradients.atoms([gradients.encode(text) for text in TEXTS]))
    torch.testing.assert_close(*atoms)


def flatten(mlp):
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view_as(x)


def test_a_layer_that_sees_some_of_the_tokens_is_refused():
    model = made("Llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.cat([forward(x[:, :2]), x[:, 2:]], dim=1)  # as an expert that tokens are routed to
    with pytest.raises(UnsupportedModelError, match="every token was expected once"):
        check_layers(model, ["model.layers.1.mlp.gate_proj"])
