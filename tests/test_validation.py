"""What the guarantee does not cover is refused with its remedy, and nothing is trained."""

import copy
import math

import pytest
import torch
from factories import arguments, pairs, tiny_clip
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, ImageTextCollator
from hf_dpclip.validation import check_environment, check_model, check_search


class Regressor(nn.Module):
    """A model whose loss is a mean over records, with a normalisation layer of choice."""

    def __init__(self, normalisation: nn.Module | None = None):
        super().__init__()
        self.normalisation = normalisation or nn.Identity()
        self.head = nn.Linear(3, 1)

    def forward(self, pixel_values):
        return {"loss": self.head(self.normalisation(pixel_values).mean(dim=(2, 3))).square().mean()}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from pairs(16)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.fixture
def assert_refused(make_trainer):
    """Construction, or else training, must raise `error` with `message` and leave the weights alone."""

    def check(message: str, error: type[Exception] = ValueError, model=None, train: bool = False, **options):
        model = tiny_clip() if model is None else model
        before = copy.deepcopy(model.state_dict())
        if train:
            trainer = make_trainer(model=model, **options)
            with pytest.raises(error, match=message):
                trainer.train()
            assert trainer.privacy_spent().steps == 0
        else:
            with pytest.raises(error, match=message):
                make_trainer(model=model, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    return check


# ---- Models ----


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.SyncBatchNorm(3), nn.BatchNorm2d(3).eval()],
    ids=["batch_norm", "without_weights", "sync_batch_norm", "in_evaluation_mode"],
)
def test_running_statistics_of_the_data_are_refused(assert_refused, layer):
    assert_refused("normalisation .such modules: 1. keeps running statistics.*GroupNorm", model=Regressor(layer))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)],
    ids=["batch_norm_without_statistics", "group_norm", "instance_norm"],
)
def test_normalisation_without_running_statistics_is_accepted(make_trainer, layer):
    trainer = make_trainer(model=Regressor(layer))
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_a_model_without_trainable_parameters_is_refused(assert_refused):
    assert_refused("no trainable parameter: set requires_grad=True", model=frozen(tiny_clip()))


def test_trainable_parameters_on_several_devices_are_refused():
    model = Regressor()
    model.elsewhere = nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="are spread over devices: load the model without device_map"):
        check_model(model)


def test_weights_from_which_nothing_can_be_learnt_are_refused(assert_refused):
    model = tiny_clip()
    nn.init.constant_(model.text_projection.weight, math.inf)
    assert_refused("trainable parameters that are not finite", model=model)


def test_parameters_without_elements_are_accepted(make_trainer):
    model = Regressor()
    model.empty = nn.Parameter(torch.zeros(0))
    trainer = make_trainer(model=model)
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_optimizers_that_take_several_gradients_in_a_step_are_refused(make_trainer):
    model = tiny_clip()
    trainer = make_trainer(model=model, trainer_options={"optimizers": (torch.optim.LBFGS(model.parameters()), None)})
    with pytest.raises(ValueError, match="LBFGS asks for several gradients in a step"):
        trainer.train()
    assert trainer.privacy_spent().steps == 0


def test_frozen_parameters_stay_as_they_are(make_trainer):
    model = tiny_clip()
    frozen(model.vision_model)
    before = [parameter.clone() for parameter in model.vision_model.parameters()]
    make_trainer(model=model).train()
    assert all(torch.equal(a, b) for a, b in zip(model.vision_model.parameters(), before))


# ---- Datasets ----


@pytest.mark.parametrize(
    "dataset", [pairs(16).to_iterable_dataset(), Stream()], ids=["datasets.IterableDataset", "torch IterableDataset"]
)
def test_a_dataset_without_random_access_is_refused(assert_refused, dataset):
    assert_refused("no random access, which Poisson sampling needs.*streaming=False", train_dataset=dataset)


def test_a_dataset_smaller_than_the_expected_batch_is_refused(assert_refused):
    assert_refused(
        "expected_batch_size=8 is not possible: expected at most the 7 privacy units.*lower the batch size",
        train_dataset=pairs(7),
    )


def test_a_dataset_as_large_as_the_expected_batch_is_accepted(make_trainer):
    assert make_trainer(train_dataset=pairs(8)).plan.sampling_probability == 1


def test_fewer_units_than_the_expected_batch_are_refused_however_many_records_they_have(assert_refused):
    dataset = pairs(64).add_column("user_id", [i % 4 for i in range(64)])
    assert_refused("at most the 4 privacy units", train_dataset=dataset, privacy_unit_column="user_id")


@pytest.mark.parametrize("delta", [1 / 64, 0.5, 0.0, -1e-5, float("nan")])
def test_a_delta_that_promises_nothing_is_refused(assert_refused, delta):
    assert_refused(r"target_delta=.* is not possible: expected positive and below 1/n = 0.0156", target_delta=delta)


def test_a_delta_below_one_over_n_is_accepted(make_trainer):
    assert make_trainer(target_delta=1e-5).plan.target_delta == 1e-5


def test_an_unknown_privacy_unit_column_is_refused(assert_refused):
    assert_refused(
        "privacy_unit_column='user' is not a column of the training dataset .it has .*input_ids",
        privacy_unit_column="user",
    )


def test_a_privacy_unit_column_of_a_dataset_without_columns_is_refused(assert_refused):
    assert_refused("needs a datasets.Dataset.* not a list", train_dataset=list(pairs(64)), privacy_unit_column="user")


@pytest.mark.parametrize("named", [False, True])
def test_evaluation_on_the_training_dataset_is_refused(make_trainer, named):
    dataset = pairs(64)
    evaluation = {"held_out": pairs(8, seed=1), "train": dataset} if named else dataset
    with pytest.raises(ValueError, match=r"eval_dataset is the private training dataset.*hf_dpclip\.data\.hold_out"):
        make_trainer(train_dataset=dataset, trainer_options={"eval_dataset": evaluation})


def test_evaluation_on_the_training_dataset_is_allowed_where_private_statistics_are(make_trainer):
    dataset = pairs(64)
    trainer = make_trainer(
        train_dataset=dataset, trainer_options={"eval_dataset": dataset}, log_private_statistics=True
    )
    assert "eval_loss" in trainer.evaluate()


def test_evaluation_on_other_data_is_accepted(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    assert "eval_loss" in trainer.evaluate()


def test_a_collator_that_names_other_columns_is_refused(tmp_path):
    records = [{"scan": None, "report": "a chest"}] * 64
    message = r"no column 'image' .it has \['report', 'scan'\].*image_column=..., text_column=..."
    with pytest.raises(ValueError, match=message):
        DPCLIPTrainer(tiny_clip(), arguments(tmp_path), ImageTextCollator(processor=None), records)


def test_training_without_a_dataset_is_refused(tmp_path):
    trainer = DPCLIPTrainer(model=tiny_clip(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="no privacy plan without a train_dataset: pass it to DPCLIPTrainer"):
        trainer.train()


# ---- Launchers ----


def test_processes_that_do_not_know_of_one_another_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"started 2 processes of which TrainingArguments know 1.*--use_cpu"):
        DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64))


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_float64_or_generators_that_are_kept_is_refused(make_trainer, monkeypatch, device):
    trainer = make_trainer()
    monkeypatch.setattr(DPTrainingArguments, "device", torch.device(device))
    with pytest.raises(ValueError, match=rf"{device} devices.*mps has no float64.*use_cpu=True"):
        check_environment(trainer)


def test_precision_that_keeps_statistics_is_refused(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp8")
    with pytest.raises(ValueError, match=r"fp8.*largest values that it has seen.*bf16"):
        check_environment(trainer)


@pytest.mark.parametrize(
    ("of", "name", "value", "message"),
    [
        ("trainer", "is_fsdp_enabled", True, "the launcher enabled FSDP or DeepSpeed.*choose DDP"),
        ("trainer", "is_deepspeed_enabled", True, "the launcher enabled FSDP or DeepSpeed.*choose DDP"),
        ("accelerator", "scaler", object(), "the launcher enabled fp16 loss scaling: use --mixed_precision bf16"),
    ],
    ids=["FSDP", "DeepSpeed", "fp16"],
)
def test_what_a_launcher_enables_beside_the_arguments_is_refused(make_trainer, monkeypatch, of, name, value, message):
    trainer = make_trainer()
    monkeypatch.setattr(trainer if of == "trainer" else trainer.accelerator, name, value)
    with pytest.raises(ValueError, match=message):
        check_environment(trainer)


# ---- Losses ----


def test_public_negatives_with_a_loss_function_of_the_users_own_are_refused(assert_refused):
    own = {"compute_loss_func": lambda outputs, labels, **_: outputs.loss, "public_negatives": ["a cat"]}
    assert_refused("public_negatives need CLIPModel.*leave them out", trainer_options=own)


def test_single_pairs_with_a_loss_of_in_batch_negatives_are_refused(assert_refused):
    assert_refused("microbatch_size=1 leaves a contrastive loss without negatives.*at least 2", microbatch_size=1)


def test_single_records_with_a_loss_that_decomposes_are_accepted(make_trainer):
    trainer = make_trainer(model=Regressor(), microbatch_size=1)
    trainer.train()
    assert trainer.plan.one_unit_per_microbatch
    assert trainer.privacy_spent().steps == 2


def test_single_pairs_with_a_loss_function_of_the_users_own_are_accepted(make_trainer):
    trainer = make_trainer(
        microbatch_size=1,
        trainer_options={"compute_loss_func": lambda outputs, labels, **_: outputs.image_embeds.square().sum()},
    )
    assert trainer.plan.sensitivity == trainer.plan.max_grad_norm


# ---- Arguments, optimizers, callbacks ----


@pytest.mark.parametrize("kind", ["TrainingArguments", "None"])
def test_arguments_without_privacy_are_refused(tmp_path, kind):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True) if kind == "TrainingArguments" else None
    with pytest.raises(ValueError, match="args must be DPTrainingArguments, which carry target_epsilon, not"):
        DPCLIPTrainer(model=tiny_clip(), args=args, train_dataset=pairs(64))


def test_an_optimizer_with_parameters_that_are_not_the_models_is_refused(assert_refused):
    model = tiny_clip()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    assert_refused(
        "optimizer holds trainable parameters that are not the model's.*neither clipped nor noised",
        model=model,
        train=True,
        trainer_options={"optimizers": (optimizer, None)},
    )


def test_an_optimizer_of_some_of_the_models_parameters_is_accepted(make_trainer):
    model = tiny_clip()
    before = model.vision_model.embeddings.class_embedding.clone()
    optimizer = torch.optim.SGD(model.text_model.parameters(), lr=0.1)
    make_trainer(model=model, trainer_options={"optimizers": (optimizer, None)}).train()
    assert torch.equal(model.vision_model.embeddings.class_embedding, before)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["freezing", "unfreezing"])
def test_a_change_of_requires_grad_during_training_is_refused(make_trainer, requires_grad):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.text_projection.requires_grad_(requires_grad)

    model = tiny_clip()
    model.text_projection.requires_grad_(not requires_grad)
    trainer = make_trainer(model=model, trainer_options={"callbacks": [Change()]})
    with pytest.raises(RuntimeError, match="requires_grad changed during training"):
        trainer.train()
    assert trainer.privacy_spent().steps == 1


@pytest.mark.parametrize("option", ["pruner", "timeout", "catch"])
def test_a_search_in_which_one_process_would_leave_the_others_waiting_is_refused(option):
    backend, settings = HPSearchBackend.OPTUNA, {option: 60}
    check_search(backend, settings, 1)
    with pytest.raises(ValueError, match=f"{option} ends a trial or the search on process 0 only"):
        check_search(backend, settings, 2)


def test_a_search_whose_processes_would_not_have_the_same_trials_is_refused():
    backend, settings = HPSearchBackend.WANDB, {}
    check_search(backend, settings, 1)
    with pytest.raises(ValueError, match="use backend='optuna', or one process"):
        check_search(backend, settings, 2)
