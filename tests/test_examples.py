"""The example scripts as a stranger runs them, mistakes included."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from factories import arguments, raw_pairs, tiny_clip, tiny_processor, with_adapters
from PIL import Image as PILImage
from scripts import ROOT, SHORT, load_script, output_of, run_main
from transformers import CLIPModel, CLIPProcessor, pipeline

from hf_dpclip import CLIPForVisualQuestionAnswering, DPCLIPTrainer, PrivacyStatement
from hf_dpclip.cli.card import check
from hf_dpclip.privacy import LEDGER_NAME


TRAIN = load_script(ROOT / "examples" / "train.py")
# It takes functions from the first one.
TRAIN_VQA = load_script(ROOT / "examples" / "train_vqa.py")


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The embedded default, cut short: its output and its folder."""
    folder = tmp_path_factory.mktemp("default")
    return output_of(ROOT / "examples" / "train.py", "--output_dir", folder, *SHORT), folder


def test_default_reports_accuracy_before_and_after_and_without_privacy(default_run):
    output, _ = default_run
    for expected in ("before", "after", "without privacy", "ε = ", "δ = 0.000109 after 2 steps"):
        assert expected in output
    assert "NOT PRIVATE" not in output


def test_default_output_opens_with_transformers(default_run):
    _, folder = default_run
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=[digit()], text=["three", "four"], padding=True, return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits_per_image).all()
    answer = pipeline("zero-shot-image-classification", model=str(folder))(digit(), candidate_labels=["three", "four"])
    assert {row["label"] for row in answer} == {"three", "four"}


def test_merged_weights_are_base_and_adapter_together(default_run):
    from peft import PeftModel

    _, folder = default_run
    base = CLIPModel.from_pretrained(ROOT / "examples" / "tiny-clip")
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    saved = CLIPModel.from_pretrained(folder).state_dict()
    assert all(torch.allclose(saved[name], value, atol=1e-6) for name, value in merged.state_dict().items())


def test_default_output_says_what_was_spent(default_run):
    _, folder = default_run
    statement = json.loads((folder / "privacy.json").read_text())
    assert statement["private"] and statement["steps"] == 2
    assert 0.99 * 8 <= statement["epsilon"] <= 8


def test_what_another_run_said_is_gone_before_merged_weights_are_written(tmp_path, monkeypatch):
    """If the second were killed there, its weights would stand beside the ε of the first."""
    private = raw_pairs(64)
    args = arguments(tmp_path / "adapter", max_steps=1)
    model = with_adapters(tiny_clip())
    trainer = DPCLIPTrainer(model, args, train_dataset=private, processing_class=tiny_processor())
    trainer.train()
    (tmp_path / "README.md").touch()
    TRAIN.save(trainer)
    assert PrivacyStatement.load(tmp_path).steps == 1
    assert not (tmp_path / "README.md").exists()
    monkeypatch.setattr(TRAIN.shutil, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TRAIN.save(trainer)
    assert Path(tmp_path, "model.safetensors").exists() and not Path(tmp_path, "privacy.json").exists()


def interrupted(*args):
    raise KeyboardInterrupt


def test_the_card_beside_the_adapters_states_the_guarantee(default_run):
    _, folder = default_run
    findings = check(folder / "adapter")
    assert not findings.problems and findings.card == "the card agrees"


def test_weights_are_saved_before_anything_that_could_fail(captioned_csv, tmp_path, monkeypatch):
    evaluate, calls = DPCLIPTrainer.evaluate, []

    def once(self, *args, **kwargs):
        calls.append(self)
        if len(calls) > 1:
            raise OSError("Stale file handle")
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(DPCLIPTrainer, "evaluate", once)
    columns = ["--image_column", "file", "--caption_column", "report"]
    with pytest.raises(SystemExit, match="Stale file handle"):
        run_main(
            monkeypatch, TRAIN, "--dataset_name", captioned_csv, *columns, *SMALL, "--output_dir", tmp_path / "out"
        )
    assert CLIPModel.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_an_interruption_says_how_to_go_on(captioned_csv, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DPCLIPTrainer, "train", interrupted)
    columns = ["--image_column", "file", "--caption_column", "report"]
    with pytest.raises(SystemExit, match=r"interrupted\. What was spent stands in the ledger"):
        run_main(
            monkeypatch, TRAIN, "--dataset_name", captioned_csv, *columns, *SMALL, "--output_dir", tmp_path / "out"
        )


def digit(seed=0):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28), dtype=np.uint8))


@pytest.fixture
def captioned_csv(tmp_path):
    """Twenty images in a folder and a table of their paths and captions."""
    rows = ["file,report"]
    for index in range(20):
        digit(index).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,scan number {index}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    return tmp_path / "pairs.csv"


SMALL = [*SHORT, "--per_device_train_batch_size", "8", "--microbatch_size", "4"]


def test_captioned_pairs_in_a_csv_file(captioned_csv, tmp_path, monkeypatch, capsys):
    columns = ["--image_column", "file", "--caption_column", "report"]
    run_main(monkeypatch, TRAIN, "--dataset_name", captioned_csv, *columns, *SMALL, "--output_dir", tmp_path / "out")
    assert "contrastive loss on held-out pairs" in capsys.readouterr().out
    assert CLIPModel.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_a_file_of_public_captions_as_negatives(captioned_csv, tmp_path, monkeypatch, capsys):
    public = tmp_path / "public.csv"
    public.write_text("\n".join(["report", *(f"public text {index}" for index in range(5))]))
    columns = ["--image_column", "file", "--caption_column", "report", "--public_negatives", public]
    every_pair = [*SHORT, "--per_device_train_batch_size", "8", "--microbatch_size", "1"]
    run_main(
        monkeypatch, TRAIN, "--dataset_name", captioned_csv, *columns, *every_pair, "--output_dir", tmp_path / "out"
    )
    assert "ε = " in capsys.readouterr().out


def test_labelled_images_on_disk_in_full_fine_tuning(tmp_path, monkeypatch, capsys):
    features = Features({"picture": Image(), "kind": Value("string")})
    records = {"picture": [digit(i) for i in range(20)], "kind": ["three", "four"] * 10}
    dataset = Dataset.from_dict(records, features=features).class_encode_column("kind")
    dataset.save_to_disk(tmp_path / "data")
    columns = ["--image_column", "picture", "--label_column", "kind", "--prompt_template", "the digit {}"]
    settings = [*SMALL, "--lora_rank", "0", "--output_dir", tmp_path / "out"]
    run_main(monkeypatch, TRAIN, "--dataset_name", tmp_path / "data", *columns, *settings)
    output = capsys.readouterr().out
    assert "zero-shot accuracy" in output and "without privacy" not in output
    assert (tmp_path / "out" / "privacy.json").is_file()


def test_an_interrupted_run_goes_on_by_the_name_of_its_folder_or_without(captioned_csv, tmp_path, monkeypatch, capsys):
    columns = ["--dataset_name", captioned_csv, "--image_column", "file", "--caption_column", "report"]
    sizes = ["--per_device_train_batch_size", "8", "--microbatch_size", "4", "--num_train_epochs", "2"]
    settings = [*columns, *sizes, "--use_cpu", "--output_dir", tmp_path / "out"]
    run_main(monkeypatch, TRAIN, *settings)
    # Without being asked for, one per epoch.
    checkpoints = sorted((tmp_path / "out" / "adapter").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    first, last = map(int, (path.name.removeprefix("checkpoint-") for path in checkpoints))
    shutil.rmtree(checkpoints[1])
    assert "runs are recorded here" not in capsys.readouterr().out
    for name in ("True", f"{tmp_path / 'out'}/", tmp_path / "out" / "adapter", checkpoints[0]):
        capsys.readouterr()
        run_main(monkeypatch, TRAIN, *settings, "--resume_from_checkpoint", name)
        output = capsys.readouterr().out
        assert f"of which taken = {first}\n" in output and f"after {last} steps" in output
        shutil.rmtree(checkpoints[1])
    # Resumed runs are one run; one from the start is another, whatever it trains.
    assert "runs are recorded here" not in output
    run_main(monkeypatch, TRAIN, *settings, "--max_steps", "1", "--lora_rank", "0")
    ledger = re.escape(str(tmp_path / "out" / "_privacy_ledger.jsonl"))
    assert re.search(rf"2 runs are recorded here; .*`hf-dpclip ledger {ledger}`", capsys.readouterr().out)


@pytest.mark.parametrize("has_adapters", [True, False])
@pytest.mark.parametrize("place", ["", "adapter"])
def test_runs_in_one_folder_go_on_with_the_ledger_that_is_there(place, has_adapters, tmp_path):
    ledger = tmp_path / place / LEDGER_NAME
    ledger.parent.mkdir(exist_ok=True)
    ledger.touch()
    args = arguments(tmp_path)
    TRAIN.choose_folders(args, "start", has_adapters)
    assert args.ledger_path == str(ledger)


def test_a_validation_split_takes_the_place_of_a_test_split():
    splits = DatasetDict(train=raw_pairs(8), validation=raw_pairs(3))
    pair = TRAIN.private_and_held_out(splits, TRAIN.ExampleArguments(), "text", None)
    assert [len(dataset) for dataset in pair] == [8, 3]
    arguments = TRAIN.ExampleArguments(train_split="validation")
    assert len(TRAIN.private_and_held_out(DatasetDict(validation=raw_pairs(40)), arguments, "text", None)[0]) < 40


def test_records_of_one_unit_are_held_out_together():
    patients = [f"patient {number // 4}" for number in range(80)]
    splits = DatasetDict(train=raw_pairs(80).add_column("patient", patients))
    train, held_out = TRAIN.private_and_held_out(splits, TRAIN.ExampleArguments(), "text", "patient")
    assert len(train) + len(held_out) == 80
    assert set(train["patient"]).isdisjoint(held_out["patient"])


def test_a_few_records_are_taken_from_the_whole_file():
    """Which may be sorted by class."""
    numbered = raw_pairs(100).add_column("number", range(100))
    arguments = TRAIN.ExampleArguments(max_train_samples=10, max_eval_samples=200)
    splits = DatasetDict(train=numbered, test=numbered)
    train, held_out = TRAIN.private_and_held_out(splits, arguments, "text", None)
    assert train["number"][:] == [*range(0, 100, 10)] and held_out["number"][:] == [*range(100)]


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("--dataset_name no/such/pairs.csv", "no/such/pairs.csv does not exist"),
        ("--dataset_name no-such-dataset", "neither a file or folder here nor a dataset that the Hub gave"),
        ("--dataset_name cifar10", "check the spelling. Known by name are mnist-5k, fashion-mnist, ylecun/mnist"),
        ("--dataset_name uoft-cs/cifar10", "uoft-cs/cifar10 is neither a file or folder here nor a dataset"),
        ("--model_name_or_path no/such-model", "no/such-model is neither a folder here nor on the Hub"),
        (f"--model_name_or_path {ROOT / 'tests'}", "tests is no model with a processor: "),
        ("--eval_split train", "--eval_split train is the split of the private records: name another one"),
        ("--eval_split validation", "--eval_split validation is not a split of the dataset (train, test)"),
        ("--train_split training", "--train_split training is not a split of the dataset (train, test)"),
        ("--prompt_template photo", "has no {} for the class name"),
        ("--target_epsilon 0", "target_epsilon=0.0 is not possible"),
        ("--target_epsilon 3 --noise_multiplier 1", "both of target_epsilon and noise_multiplier"),
        ("--microbatch_size 7", "microbatch_size=7 does not divide"),
        ("--dataset_name mnist-5k --microbatch_size 1", "of at least 2; 8 is a good start"),
        ("--public_negatives nowhere.csv", "nowhere.csv does not exist"),
        ("--per_device_train_batch_size 8000", "at most the 4000 privacy units"),
        ("--target_delta 0.1", "below 1/n"),
        ("--fp16", "use bf16=True instead"),
    ],
)
def test_mistakes_get_one_line_that_says_how_to_mend_them(tmp_path, monkeypatch, mistake, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_main(monkeypatch, TRAIN, *mistake.split(), "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "columns, message",
    [
        ("--image_column file --caption_column text", "--caption_column text is not a column"),
        ("--image_column file", "['report', 'file']: name the one with the captions with --caption_column"),
        ("--caption_column report", "no image column 'image', only ['file', 'report']"),
        ("--image_column file --label_column report", "'report' is not a ClassLabel column"),
    ],
)
def test_wrong_columns_are_named(captioned_csv, monkeypatch, columns, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_main(monkeypatch, TRAIN, "--dataset_name", captioned_csv, *columns.split())


def test_a_file_is_no_output_folder(tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match="out is a file: name a folder"):
        run_main(monkeypatch, TRAIN, "--output_dir", tmp_path / "out")


def test_the_model_that_adapters_belong_to_is_not_replaced(tmp_path, monkeypatch):
    tiny_clip().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is where training starts from"):
        run_main(monkeypatch, TRAIN, "--model_name_or_path", tmp_path, "--output_dir", f"{tmp_path}/", *SHORT)


def test_adapters_are_no_model_to_start_from(tmp_path, monkeypatch):
    with_adapters(tiny_clip()).save_pretrained(tmp_path / "adapter")
    tiny_processor().save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="adapter holds adapters only: name the model that they were merged into"):
        run_main(monkeypatch, TRAIN, "--model_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(("after", "worse"), [(0.4, True), (0.5, False), (0.6, False)])
def test_a_model_that_became_worse_is_called_so(tmp_path, monkeypatch, capsys, after, worse):
    found = iter([0.5, after])
    monkeypatch.setattr(TRAIN, "zero_shot_accuracy", lambda *_: next(found))
    run_main(monkeypatch, TRAIN, *SHORT, "--compare_non_private", "False", "--output_dir", tmp_path / "out")
    assert ("The model is worse than before" in capsys.readouterr().out) == worse


# ---- Visual question answering ----


@pytest.fixture
def questions_csv(captioned_csv):
    rows = [f"{index}.png,is it a four,{['yes', 'no'][index % 2]}" for index in range(20)]
    captioned_csv.write_text("\n".join(["scan,asked,finding", *rows]))
    return captioned_csv


QUESTION_COLUMNS = ["--image_column", "scan", "--question_column", "asked", "--answer_column", "finding"]


def test_default_questions_are_answered_with_the_baselines_beside(tmp_path, monkeypatch, capsys):
    few = ["--max_train_samples", "500", "--per_device_train_batch_size", "5", *SHORT]
    run_main(monkeypatch, TRAIN_VQA, *few, "--output_dir", tmp_path / "out")
    output = capsys.readouterr().out
    for row in ("CLIP, private", "CLIP, without privacy", "question only, without privacy", "most frequent answer"):
        assert re.search(rf"{row} +\d+\.\d%", output)
    assert "Privacy of each image_id: ε = " in output and "NOT PRIVATE" not in output
    model = CLIPForVisualQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 13
    plan = PrivacyStatement.load(tmp_path / "out").plan
    assert plan.num_examples < 100 and plan.sensitivity == plan.max_grad_norm


def test_own_questions_with_adapters(questions_csv, tmp_path, monkeypatch, capsys):
    settings = ["--answers", "yes,no", "--trained", "adapters", "--per_device_train_batch_size", "4", *SHORT]
    data = ["--dataset_name", questions_csv, *QUESTION_COLUMNS]
    run_main(monkeypatch, TRAIN_VQA, *data, *settings, "--output_dir", tmp_path / "out")
    output = capsys.readouterr().out
    assert "Privacy of each record: ε = " in output and "question only" not in output
    assert CLIPForVisualQuestionAnswering.from_pretrained(tmp_path / "out").config.id2label == {0: "yes", 1: "no"}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("", "--answers is missing: list what may be answered"),
        ("--answers yes,yes", "differ from one another"),
        ("--answers yes,no --question_column text", "the dataset has no column 'text'"),
        ("--answers yes,no --privacy_unit_column patient", "privacy_unit_column='patient' is not a column"),
        (
            "--answers yes,no --model_name_or_path no/such-model",
            "no/such-model is neither a folder here nor on the Hub",
        ),
    ],
)
def test_mistakes_with_questions_get_one_line(questions_csv, tmp_path, monkeypatch, mistake, message):
    data = ["--dataset_name", questions_csv, *QUESTION_COLUMNS, "--per_device_train_batch_size", "4"]
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_main(monkeypatch, TRAIN_VQA, *data, *mistake.split(), "--output_dir", tmp_path / "out", "--use_cpu")
