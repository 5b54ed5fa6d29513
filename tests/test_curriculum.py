"""A curriculum of lengths: each stage trains as one process does, and the model keeps its RoPE."""

import copy

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from tiny import batch_of, reference_loss_sum, tiny_config, tiny_model
from tiny_softmax import LLAMA3_ROPE, YARN_ROPE, logits, tiny_softmax_model

import hybridsp
from hybridsp.curriculum import enter_stage, plan_stages, scale_rate, set_rope, stage_of
from hybridsp.recipe import Recipe

PRELOAD += DEEPSPEED

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
STAGES = [
    {"seq_length": 16, "max_steps": 3, "micro_batch_size": 2},
    {
        "seq_length": 32,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 6e-4,
        "rope_parameters": {"rope_theta": 5e5},
    },
    {"seq_length": 64, "max_steps": 3, "gradient_accumulation_steps": 1, "rope_parameters": YARN},
]


def recipe(**changes):
    required = {"model": "m", "data": "d", "output_dir": "o", "learning_rate": 2e-3}
    return Recipe(**{**required, "gradient_accumulation_steps": 3, "stages": STAGES, **changes})


def test_stages_follow_each_other():
    made = recipe()
    assert (made.seq_length, made.max_steps) == (64, 8)
    first, second, third = stages = plan_stages(made, tiny_config())
    assert [(s.number, s.first_step, s.last_step) for s in stages] == [
        (1, 1, 3),
        (2, 4, 5),
        (3, 6, 8),
    ]
    assert [s.micro_batch_size for s in stages] == [2, 1, 1]
    assert [s.gradient_accumulation_steps for s in stages] == [3, 2, 1]
    assert [s.learning_rate_factor for s in stages] == pytest.approx([1, 0.3, 1])
    assert first.rope_parameters is None
    assert second.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert third.rope_parameters == {**YARN, "rope_theta": 5e5}, "theta stays"
    assert [stage_of(stages, step).number for step in (1, 3, 4, 5, 6, 8, 99)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]


def test_without_stages_a_run_is_one_stage():
    made = recipe(stages=None, seq_length=48, max_steps=7, micro_batch_size=5)
    (stage,) = plan_stages(made, tiny_config())
    assert (stage.first_step, stage.last_step, stage.seq_length) == (1, 7, 48)
    assert (stage.micro_batch_size, stage.gradient_accumulation_steps) == (5, 3)
    assert (stage.learning_rate_factor, stage.rope_parameters) == (1.0, None)


@pytest.mark.parametrize(
    ("config", "rope", "message"),
    [
        ({}, {"rope_type": "dynamic", "factor": 2.0}, r"stages.0.rope_parameters: .*no rank sees"),
        ({}, {"rope_type": "longrope"}, "no rank sees; use linear, yarn or llama3"),
        ({}, {"rope_type": "yarnn"}, "'yarnn' is unknown; known: default, linear, .*yarn"),
        ({}, {"rope_type": "yarn", "factor": None}, "factor = None: give a value"),
        ({}, {"rope_type": "yarn"}, "transformers refuses them: .*factor"),
        ({"softmax_rope": False}, {"rope_theta": 1e6}, "has no layer with RoPE"),
    ],
)
def test_rope_that_cannot_be_trained_is_refused(config, rope, message):
    stage = {"seq_length": 16, "max_steps": 1, "rope_parameters": rope}
    with pytest.raises(ValueError, match=message):
        plan_stages(recipe(stages=[stage]), tiny_config(**config))


ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
}
MODELS = {
    "hybrid": lambda: tiny_model(linear_rope=True, num_attention_heads=3, linear_num_heads=3),
    "llama": lambda: tiny_softmax_model("llama"),
    "llama with llama3": lambda: tiny_softmax_model("llama-llama3-rope"),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", MODELS)
def test_changed_rope_is_that_of_a_model_made_with_it(tmp_path, name, rope):
    model = MODELS[name]()
    before, had = logits(model, TOKENS), model.config.rope_parameters
    set_rope(model, ROPES[rope], 999)
    after = logits(model, TOKENS)
    assert torch.allclose(before, after) == (had == ROPES[rope])
    assert model.config.max_position_embeddings == 999
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.rope_parameters == ROPES[rope]
    torch.testing.assert_close(logits(again, TOKENS), after, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{}, {"softmax_rope": False}], ids=["RoPE", "no RoPE"])
def test_a_longer_stage_is_known_to_the_config(tmp_path, changes):
    model = tiny_model(**changes)
    before, rope = logits(model, TOKENS), model.config.rope_parameters
    for length, known in [(128, 128), (999, 999), (64, 999)]:
        set_rope(model, None, length)
        assert model.config.max_position_embeddings == known
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.max_position_embeddings == 999
    assert again.config.rope_parameters == rope
    torch.testing.assert_close(logits(again, TOKENS), before, rtol=0, atol=0)


TOKENS = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))


def batches_of(made, stages, dp):
    """Batches of each step, [step][dp rank][micro-batch]."""
    steps = []
    for stage in stages:
        for step in range(stage.first_step, stage.last_step + 1):
            seeds = iter(range(100 * step, 100 * step + 99))
            steps.append(
                [
                    [
                        batch_of(
                            stage.micro_batch_size,
                            stage.seq_length,
                            seed=next(seeds),
                            ignored=[slice(0, 3 + rank)],
                        )
                        for _ in range(stage.gradient_accumulation_steps)
                    ]
                    for rank in range(dp)
                ]
            )
    return steps


def schedule(made):
    """A rate that is another one at each step, as DeepSpeed's WarmupDecayLR makes it."""
    total = made.max_steps + 2
    params = {
        "warmup_max_lr": made.learning_rate,
        "warmup_num_steps": 2,
        "warmup_type": "linear",
        "total_num_steps": total,
    }
    return {"type": "WarmupDecayLR", "params": params}


def train_through_stages(made, stage_numbers):
    """Loss, norm and rate of each step, at some ZeRO stages; then what the config says."""
    mesh = hybridsp.SPMesh(ring=made.ring, ulysses=made.ulysses)
    results = []
    for zero in stage_numbers:
        model = tiny_model(linear_rope=True)
        model.activation_checkpointing_enable()
        hybridsp.parallelize(model, mesh)
        stages = plan_stages(made, model.config)
        adamw = {"lr": made.learning_rate, "weight_decay": 0.0, "betas": [0.9, 0.95]}
        config = {
            "train_micro_batch_size_per_gpu": made.micro_batch_size,
            "gradient_accumulation_steps": made.gradient_accumulation_steps,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": zero, "reduce_bucket_size": 10000},
            "optimizer": {"type": "AdamW", "params": {**adamw, "torch_adam": True}},
            "scheduler": schedule(made),
        }
        engine = hybridsp.initialize(model, mesh, config)
        engine.train()
        engine.lr_scheduler.step(2)
        record, steps = [], iter(batches_of(made, stages, mesh.dp))
        for stage in stages:
            enter_stage(engine, stage)
            for _ in range(stage.first_step, stage.last_step + 1):
                rate = scale_rate(engine, stage)
                micro = [hybridsp.shard_batch(b, mesh) for b in next(steps)[mesh.dp_rank]]
                result = hybridsp.train_step(engine, micro)
                record.append((result.loss, result.grad_norm, rate))
        results.append((record, model.config.rope_parameters, engine.train_batch_size()))
    return results


def reference(made, dp):
    """The same by one process on whole sequences, each stage's model made anew with its RoPE."""
    model = tiny_model(linear_rope=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=made.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    stages = plan_stages(made, model.config)
    steps = iter(batches_of(made, stages, dp))
    record = []
    for stage in stages:
        if stage.rope_parameters is not None:
            config = copy.deepcopy(model.config)
            config.rope_parameters = dict(stage.rope_parameters)
            model.model.rotary_embs = type(model)(config).model.rotary_embs
        for step in range(stage.first_step, stage.last_step + 1):
            falls = (made.max_steps + 1 - step) / made.max_steps
            rate = optimizer.param_groups[0]["lr"] = (
                made.learning_rate * falls * stage.learning_rate_factor
            )
            sums = [reference_loss_sum(model, b) for rank in next(steps) for b in rank]
            loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            record.append((loss.item(), norm.item(), rate))
    return record, stages[-1].rope_parameters


@pytest.mark.parametrize(
    ("ring", "ulysses", "dp", "backend"),
    [
        (2, 1, 1, "gloo"),
        (1, 2, 2, "gloo"),
        pytest.param(2, 1, 1, "nccl", marks=pytest.mark.gpu),
        pytest.param(1, 2, 1, "nccl", marks=pytest.mark.gpu),
    ],
)
def test_every_stage_trains_as_one_process_does(ring, ulysses, dp, backend):
    made = recipe(ring=ring, ulysses=ulysses)
    expected, rope = reference(made, dp)
    world, zero_stages = ring * ulysses * dp, [0, 2, 3]
    results = run_ranks(
        train_through_stages, world, made, zero_stages, timeout=240, backend=backend
    )
    for rank_results in results:
        for record, rope_parameters, batch_size in rank_results:
            for step, (got, want) in enumerate(zip(record, expected, strict=True), start=1):
                assert got == pytest.approx(want, rel=1e-4), f"step {step}"
            assert rope_parameters == rope
            assert batch_size == dp, "the last stage's"
