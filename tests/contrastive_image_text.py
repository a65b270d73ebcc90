"""A script in the shape of transformers' contrastive image-text example, with the ordinary `Trainer`.

`test_migrating.py` makes it private by the diff that `docs/migrating.md` shows, and by nothing else.
"""

import os
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A dual encoder with its tokenizer and image processor."})
    freeze_vision_model: bool = field(default=False, metadata={"help": "Train the text tower only."})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "JSON lines with paths of images and captions."})
    validation_file: str = field(metadata={"help": "The same, of held-out pairs."})
    image_column: str = field(default="image_path")
    caption_column: str = field(default="caption")
    max_seq_length: int = field(default=16)


def collate_fn(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "input_ids": torch.tensor([example["input_ids"] for example in examples]),
        "attention_mask": torch.tensor([example["attention_mask"] for example in examples]),
        "return_loss": True,
    }


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    datasets = load_dataset("json", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    image_processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path)
    model = AutoModel.from_pretrained(model_args.model_name_or_path)
    if model_args.freeze_vision_model:
        model.vision_model.requires_grad_(False)
    set_seed(training_args.seed)

    def tokenize_captions(examples):
        texts = tokenizer(
            examples[data_args.caption_column],
            max_length=data_args.max_seq_length,
            padding="max_length",
            truncation=True,
        )
        return {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}

    def transform_images(examples):
        images = [Image.open(path).convert("RGB") for path in examples[data_args.image_column]]
        examples["pixel_values"] = [image_processor(image, return_tensors="pt").pixel_values[0] for image in images]
        return examples

    datasets = datasets.map(tokenize_captions, batched=True, remove_columns=[data_args.caption_column])
    datasets.set_transform(transform_images)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"] if training_args.do_train else None,
        eval_dataset=datasets["validation"] if training_args.do_eval else None,
        data_collator=collate_fn,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        tokenizer.save_pretrained(training_args.output_dir)
        image_processor.save_pretrained(training_args.output_dir)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(
        finetuned_from=os.path.basename(model_args.model_name_or_path), tasks="contrastive-image-text-modeling"
    )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
