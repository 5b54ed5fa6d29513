"""The objectives against one process: losses and every gradient, at every mesh and ZeRO stage.

One process computes them from whole logits and whole attention outputs, as Hugging Face's own
models give them, with no code of `hybridsp.distill`.
"""

from itertools import pairwise

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_engine import (
    PACKED,
    STAGES,
    TOLERANCE,
    UNPACKED,
    deepspeed_config,
    relative_error,
)
from tiny import VOCABULARY, reference_loss_sum, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import hybridsp
from hybridsp.deepspeed_config import deepspeed_config as make_config
from hybridsp.deepspeed_config import first_iteration
from hybridsp.distill import (
    Alignment,
    Matching,
    Teacher,
    check_pair,
    learning_only,
    two_rates,
)
from hybridsp.distill.align import layers_to_align
from hybridsp.prepare import check_same_tokenizer
from hybridsp.recipe import Recipe

PRELOAD += [*DEEPSPEED, "hybridsp.distill"]

SHARED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
]
OPTIONS = {"temperature": 2.0, "ce_weight": 0.25}


def tiny_teacher(seed=7, **changes):
    """Of the student's width, depth and vocabulary, and other weights."""
    torch.manual_seed(seed)
    config = tiny_config()
    options = {name: getattr(config, name) for name in SHARED}
    return LlamaForCausalLM(LlamaConfig(**{**options, "tie_word_embeddings": True, **changes}))


def whole(batch):
    """Tokens, shifted labels and keyword arguments of a batch, for one process."""
    tokens, labels = batch["input_ids"], batch["labels"]
    bounds = [0, tokens.shape[1]]
    if "cu_seqlens" in batch:
        tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
        bounds = batch["cu_seqlens"].tolist()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    shifted[:, [end - 1 for end in bounds[1:]]] = -100
    starts = torch.repeat_interleave(torch.tensor(bounds[:-1]), torch.tensor(bounds).diff())
    positions = (torch.arange(tokens.shape[1]) - starts)[None].expand_as(tokens)
    arguments = {"position_ids": positions, "use_cache": False}
    if "cu_seqlens" in batch:
        arguments["cu_seq_lens_q"] = batch["cu_seqlens"]
    return tokens, shifted, arguments


def by_document(model, batch, tokens):
    """Row and span of each document: a dense model of transformers knows no packing by itself."""
    if "cu_seqlens" not in batch:
        return [(slice(r, r + 1), slice(0, tokens.shape[1])) for r in range(len(tokens))]
    bounds = batch["cu_seqlens"].tolist()
    return [(slice(0, 1), slice(a, b)) for a, b in pairwise(bounds)]


def teacher_views(teacher, batch):
    """Logits, layer inputs and attention outputs of a teacher, each [B, T, ...]."""
    tokens, _, _ = whole(batch)
    layers = teacher.model.layers
    logits = torch.zeros(*tokens.shape, VOCABULARY)
    width = teacher.config.hidden_size
    inputs, outputs = (torch.zeros(len(layers), *tokens.shape, width) for _ in range(2))
    for row, span in by_document(teacher, batch, tokens):
        hooks = []
        for i, layer in enumerate(layers):

            def store(_, given, out, i=i, row=row, span=span):
                outputs[i][row, span] = out[0]

            def store_input(_, given, i=i, row=row, span=span):
                inputs[i][row, span] = given[0]

            hooks.append(layer.self_attn.register_forward_hook(store))
            hooks.append(layer.register_forward_pre_hook(store_input))
        with torch.no_grad():
            logits[row, span] = teacher(input_ids=tokens[row, span]).logits
        for hook in hooks:
            hook.remove()
    return logits, inputs, outputs


def reference_matching(batches):
    """Loss and gradients of one process from whole logits, and means of KL and CE."""
    student, teacher = tiny_model(), tiny_teacher()
    sums = torch.zeros(3)
    total, count = 0.0, 0
    for batch in batches:
        tokens, labels, arguments = whole(batch)
        logits = student(input_ids=tokens, **arguments).logits[labels != -100]
        wished = teacher_views(teacher, batch)[0][labels != -100]
        temperature = OPTIONS["temperature"]
        kl = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            F.log_softmax(wished / temperature, -1),
            reduction="sum",
            log_target=True,
        )
        ce = F.cross_entropy(logits, labels[labels != -100], reduction="sum")
        total = total + temperature**2 * kl + OPTIONS["ce_weight"] * ce
        sums += torch.stack([kl.detach(), ce.detach(), torch.tensor(0.0)])
        count += len(logits)
    loss = total / count
    loss.backward()
    means = {"kl": sums[0].item() / count, "ce": sums[1].item() / count}
    return loss.item(), {n: p.grad for n, p in student.named_parameters()}, means


def reference_alignment(batches):
    """As `reference_matching`, of the sum of relative errors; the batches are one micro-batch."""
    student, teacher = tiny_model(), tiny_teacher()
    layers = [0, 2]
    errors, energies = torch.zeros(4), torch.zeros(4)
    for batch in batches:
        _, labels, arguments = whole(batch)
        counts = labels != -100
        _, inputs, outputs = teacher_views(teacher, batch)
        arguments.pop("use_cache")
        for i in layers:
            layer = student.model.layers[i]
            rotary = student.model.rotary_embs
            positions = arguments["position_ids"]
            rotation = None
            if "linear_attention" in rotary:
                rotation = rotary["linear_attention"](inputs[i], positions)
            answer = layer.linear_attn(
                layer.input_layernorm(inputs[i]),
                position_embeddings=rotation,
                cu_seq_lens_q=arguments.get("cu_seq_lens_q"),
            )
            error = (answer - outputs[i])[counts].square().sum()
            errors = errors + F.one_hot(torch.tensor(i), 4) * error
            energies[i] += outputs[i][counts].square().sum()
    relative = errors[layers] / energies[layers]
    loss = relative.sum()
    loss.backward()
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    by_layer = {f"mse/layer_{i:02d}": e.item() for i, e in zip(layers, relative, strict=True)}
    grads = {n: g for n, g in grads.items() if "linear_attn" in n}
    return loss.item(), grads, {"mse": relative.mean().item(), **by_layer}


REFERENCES = {"align": reference_alignment, "distill": reference_matching}


def build(objective, mesh, stage=1, reduce_scatter=True, teacher=None, **config):
    """An engine with an objective installed."""
    student, model = tiny_model(), teacher or tiny_teacher()
    for one in (student, model):
        hybridsp.parallelize(one, mesh)
    if objective == "align":
        learning_only(student)
    learns = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-3)
    settings = deepspeed_config(stage, reduce_scatter, **config)
    engine = hybridsp.initialize(student, mesh, settings, optimizer=optimizer, self_check=False)
    taught = Teacher(model, mesh, settings if stage != 3 else {})
    if objective == "align":
        return engine, Alignment(student, taught), taught
    return engine, Matching(student, taught, **OPTIONS), taught


def gradients_on_mesh(objective, ring, ulysses, dp_batches, stages):
    from deepspeed.utils import safe_get_full_grad

    mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
    batch = dp_batches[mesh.dp_rank]
    results = []
    for stage, reduce_scatter in stages:
        engine, installed, _ = build(objective, mesh, stage, reduce_scatter)
        loss = engine(**hybridsp.shard_batch(batch, mesh)).loss
        engine.backward(loss)
        learns = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        grads = {name: safe_get_full_grad(p) for name, p in learns.items()}
        results.append((loss.item(), grads, installed.metrics()))
    return results


def check(objective, ring, ulysses, dp, batches, stages, backend="gloo"):
    expected_loss, expected, expected_metrics = REFERENCES[objective](batches[:dp])
    results = run_ranks(
        gradients_on_mesh,
        dp * ring * ulysses,
        objective,
        ring,
        ulysses,
        batches[:dp],
        stages,
        timeout=240,
        backend=backend,
    )
    for rank_result in results:
        for (stage, _), (loss, grads, metrics) in zip(stages, rank_result, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5), f"loss at stage {stage}"
            assert metrics == pytest.approx(expected_metrics, rel=1e-5)
            assert grads.keys() == expected.keys()
            errors = {name: relative_error(grads[name], expected[name]) for name in grads}
            wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
            assert not wrong, f"relative error of gradients at stage {stage}"


@pytest.mark.parametrize("objective", ["align", "distill"])
@pytest.mark.parametrize(
    ("ring", "ulysses", "dp", "batches"),
    [
        (1, 1, 1, UNPACKED),
        (2, 1, 1, PACKED),
        (1, 2, 2, PACKED),
        (2, 2, 1, PACKED),
        (4, 1, 1, UNPACKED),
    ],
    ids=["1", "ring2", "ulysses2 dp2", "ring2 ulysses2", "ring4 unpacked"],
)
def test_gradients_equal_one_process(objective, ring, ulysses, dp, batches):
    check(objective, ring, ulysses, dp, batches, STAGES)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["align", "distill"])
@pytest.mark.parametrize(("ring", "ulysses", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_gradients_equal_one_process_on_gpus(objective, ring, ulysses, dp):
    check(objective, ring, ulysses, dp, PACKED, STAGES, backend="nccl")


def step_of_two_micro_batches(objective, ring):
    """Loss and norm of a step over all micro-batches, and what an evaluation says around it."""
    mesh = hybridsp.SPMesh(ring=ring)
    engine, installed, teacher = build(objective, mesh, gradient_accumulation_steps=2)
    batches = [hybridsp.shard_batch(batch, mesh) for batch in PACKED]
    plain = hybridsp.eval_step(engine, batches)
    before = {n: p.clone() for n, p in engine.module.named_parameters()}
    step = hybridsp.train_step(engine, batches)
    learnt = {n for n, p in engine.module.named_parameters() if not torch.equal(p, before[n])}
    return step.loss, step.grad_norm, installed.metrics(), plain, teacher.evaluate(batches), learnt


@pytest.mark.parametrize("objective", ["align", "distill"])
def test_a_step_of_several_micro_batches(objective):
    """Alignment is the mean of its micro-batches, matching the mean over all their labels."""
    if objective == "align":
        each = [reference_alignment([batch]) for batch in PACKED]
        want = sum(loss for loss, _, _ in each) / 2
        grads = [sum(g[n] for _, g, _ in each) / 2 for n in each[0][1]]
        metrics = {n: sum(m[n] for _, _, m in each) / 2 for n in each[0][2]}
    else:
        want, by_name, metrics = reference_matching(PACKED)
        grads = list(by_name.values())
    norm = torch.stack([grad.norm() for grad in grads]).norm().item()
    sums = [reference_loss_sum(tiny_model(), batch) for batch in PACKED]
    plain = sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)
    judged = [teacher_views(tiny_teacher(), batch)[0] for batch in PACKED]
    labels = [whole(batch)[1] for batch in PACKED]
    teachers = F.cross_entropy(torch.cat(judged, 1)[0], torch.cat(labels, 1)[0]).item()
    for got in run_ranks(step_of_two_micro_batches, 2, objective, 2, timeout=120):
        assert got[:2] == pytest.approx((want, norm), rel=1e-5)
        assert got[2] == pytest.approx(metrics, rel=1e-5)
        assert got[3:5] == pytest.approx((plain, teachers), rel=1e-5), "in evaluation: plain loss"
        names = {name for name, _ in tiny_model().named_parameters()}
        mixers = {name for name in names if ".linear_attn." in name}
        assert got[5] == (mixers if objective == "align" else names)


def rates_of_steps(schedule):
    mesh = hybridsp.SPMesh()
    student = tiny_model()
    hybridsp.parallelize(student, mesh)
    settings = dict(zip(("model", "data", "output_dir"), "mdo", strict=True))
    recipe = Recipe(**settings, seq_length=8, max_steps=8, learning_rate=1e-3, schedule=schedule)
    config = {**make_config(recipe, mesh), "gradient_clipping": 0.0}
    config["zero_optimization"] |= {"reduce_bucket_size": 10_000, "stage": 1}
    optimizer, config = two_rates(student, config, 4e-3)
    engine = hybridsp.initialize(student, mesh, config, optimizer=optimizer, self_check=False)
    engine.lr_scheduler.step(first_iteration(recipe))
    batch = hybridsp.shard_batch(PACKED[0], mesh)
    before = {n: p.clone() for n, p in student.named_parameters()}
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in engine.optimizer.param_groups])
        hybridsp.train_step(engine, [batch])
    # Adam's first steps are as long as its rate, whatever the gradient.
    moved = {n: (p - before[n]).abs().max().item() for n, p in student.named_parameters()}
    return rates, moved


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_converted_mixers_learn_at_a_rate_of_their_own(schedule):
    ((rates, moved),) = run_ranks(rates_of_steps, 1, schedule)
    for rest, converted in rates:
        assert converted == pytest.approx(4 * rest)
    assert rates[0][0] > 0.9e-3
    assert (rates[2][0] < rates[0][0]) == (schedule != "constant")
    for name, distance in moved.items():
        fast = ".linear_attn." in name
        assert 0 < distance < (13e-3 if fast else 3.3e-3), name
        assert not fast or distance > 3.3e-3, name


class Vocabulary:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_pairs_that_cannot_teach_are_refused():
    teacher, student = tiny_teacher().config, tiny_config()
    check_pair(teacher, student, aligns=True)
    for change, aligns, message in [
        ({"vocab_size": 60}, False, "teacher has vocab_size = 60, model has 61"),
        ({"num_hidden_layers": 3}, True, "teacher has num_hidden_layers = 3, model has 4"),
        ({"hidden_size": 18}, True, "teacher has hidden_size = 18, model has 36"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_pair(tiny_teacher(**change).config, student, aligns=aligns)
    check_pair(tiny_teacher(num_hidden_layers=3).config, student, aligns=False)
    with pytest.raises(ValueError, match="teacher has linear_attention layers itself"):
        check_pair(student, student, aligns=True)
    with pytest.raises(ValueError, match="model is a llama without linear_attention layers"):
        check_pair(teacher, teacher, aligns=False)

    check_same_tokenizer("teacher", Vocabulary("a", "b"), "model", Vocabulary("a", "b"), "mend it")
    for other in (Vocabulary("a"), Vocabulary("b", "a"), Vocabulary("a", "c")):
        with pytest.raises(ValueError, match="teacher and model have different tokenizers"):
            check_same_tokenizer("teacher", Vocabulary("a", "b"), "model", other, "mend it")


def test_softmax_layers_that_lost_their_positions_are_aligned_too():
    config = tiny_config(softmax_rope=False)
    assert layers_to_align(config) == [0, 1, 2, 3]
    assert layers_to_align(tiny_config()) == [0, 2]
