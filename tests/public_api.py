"""What users write, for the type checker: `.ci/run` checks this file strictly; no test runs it."""

from transformers import CLIPModel, CLIPProcessor

from hf_dpclip import (
    DPCLIPTrainer,
    DPTrainingArguments,
    ImageTextCollator,
    PrivacyPlan,
    PrivacySpent,
    PrivacyStatement,
    freeze_batch_norm,
    lora_config,
)


def planned(examples: int) -> float:
    plan = PrivacyPlan.calibrate(
        target_epsilon=3.0,
        num_examples=examples,
        expected_batch_size=512,
        num_microbatches=64,
        num_steps=100,
        accountant="rdp",
    )
    delta: float = plan.target_delta
    return plan.epsilon(steps=10) + delta + plan.noise_multiplier


def trained(dataset: object) -> PrivacySpent:
    model = CLIPModel.from_pretrained("model")
    processor = CLIPProcessor.from_pretrained("model")
    args = DPTrainingArguments("output", target_epsilon=3.0, microbatch_size=8, noise_seed=None)
    collator = ImageTextCollator(processor, image_column="scan", text_column="report")
    trainer = DPCLIPTrainer(
        freeze_batch_norm(model), args, collator, dataset, processing_class=processor, public_negatives=["a cat"]
    )
    trainer.train()
    rank: int | None = lora_config(model, r=4).r
    steps: int = trainer.plan.num_steps + trainer.args.num_microbatches + (rank or 0)
    statement: PrivacyStatement = trainer.privacy_statement()
    statement.save("output")
    assert steps > statement.steps
    return trainer.privacy_spent()
