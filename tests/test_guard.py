"""What users of `Trainer` do, and what would silently break the guarantee: refused, or marked, or without effect."""

import copy
import functools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import Given, check_bounded, sum_of_clipped, vectors
from datasets import DatasetDict
from factories import SAVING, arguments, pairs, tiny_clip, tiny_processor, with_texts
from gradient_checks import lora_clip
from plans import one_step_plan
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer, PrivacyStatement
from hf_dpclip.modules_in_use import modules_in_use
from hf_dpclip.privacy import clip_


# ---- Randomness of model and data ----


class Dropping(Given):
    """Drops coordinates at random, as many draws as the microbatch has records."""

    def forward(self, vector, labels=None):
        return super().forward(nn.functional.dropout(vector, 0.5))


def neighbours(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    records = vectors(*torch.randn(40, 6, generator=generator).tolist())
    others = [[2 * j, 2 * j + 1] for j in range(1, 16)]
    with_it, without = (
        sum_of_clipped(tmp_path, monkeypatch, Dropping(6), records, [first, *others], microbatch_size=1)
        for first in ([0, 1, 39], [0, 1])
    )
    return with_it - without


def test_dropout_does_not_carry_a_record_into_later_microbatches(tmp_path, monkeypatch):
    check_bounded(neighbours(tmp_path, monkeypatch), 2.0)


def test_shared_dropout_would(tmp_path, monkeypatch):
    """The same with one stream for all microbatches, which is what frameworks do by default."""

    class OneStream:
        def __init__(self, seed):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("hf_dpclip.forward_pass.seeded", OneStream)
    with pytest.raises(AssertionError, match="norm"):
        check_bounded(neighbours(tmp_path, monkeypatch), 2.0)


@pytest.mark.parametrize("drawn", [[], [0], list(range(30))], ids=len)
def test_the_saved_generator_state_does_not_show_the_batch(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [torch.tensor(drawn).long().numpy()])
    args = arguments(tmp_path, max_steps=1, seed=0, **SAVING)
    trainer = DPCLIPTrainer(Dropping(6), args, train_dataset=vectors(*[[1.0] * 6] * 40))
    assert_one_number_is_drawn(trainer)


@pytest.mark.parametrize("microbatch_size", [2, 4, 8], ids=["all at once", "one by one", "chunks"])
@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 8, 30])
def test_nor_does_it_however_microbatches_are_computed(tmp_path, monkeypatch, drawn, microbatch_size):
    """Dropout draws, and a loader of chunks does whenever it is gone through."""
    count = 8 // microbatch_size
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: np.array_split(np.arange(drawn), count))
    args = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        microbatch_size=microbatch_size,
        max_steps=1,
        **SAVING,
    )
    trainer = DPCLIPTrainer(lora_clip(lora_dropout=0.4), args, train_dataset=pairs(40))
    assert_one_number_is_drawn(trainer)


def assert_one_number_is_drawn(trainer):
    """As far as the checkpoint shows: the base seed of the data loader, whatever the batch."""
    torch.manual_seed(0)
    trainer.train()
    path = Path(trainer.args.output_dir, "checkpoint-1", "rng_state.pth")
    state = torch.load(path, weights_only=False)["cpu"]
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(state, torch.random.get_rng_state())


# ---- The clipping bound ----


@pytest.mark.parametrize("size", [25_000_000])
def test_millions_of_small_entries_do_not_slip_through_the_norm(size):
    """Their squares are lost when they are added up in float32."""
    gradient = torch.full((size,), 1e-3)
    gradient[:10] = 3.0
    clip_([gradient], one_step_plan(max_grad_norm=1.0))
    check_bounded(gradient, 1.0)


def test_a_bound_at_which_squares_underflow_is_refused():
    with pytest.raises(ValueError, match="at least 1e-6"):
        one_step_plan(max_grad_norm=1e-25)


# ---- Changes after construction ----


class Change(TrainerCallback):
    """Applies a change in the middle of training."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.change(args)


def test_accumulating_more_forward_passes_midway_is_refused(make_trainer):
    change = Change(lambda args: setattr(args, "gradient_accumulation_steps", 2))
    run = make_trainer(trainer_options={"callbacks": [change]}, max_steps=6)
    with pytest.raises(RuntimeError, match="2 forward passes, of which 2 came to an end, instead of 1"):
        run.train()


@pytest.mark.parametrize("name, value", [("noise_seed", 3), ("log_private_statistics", True)])
def test_arguments_that_are_changed_later_mark_the_run_for_good(make_trainer, name, value):
    run = make_trainer()
    setattr(run.args, name, value)
    run.train()
    setattr(run.args, name, type(value)() if value is True else None)
    assert [reason for reason in run.privacy_statement().not_private_because if name in reason]


@pytest.mark.parametrize(
    "show",
    [
        lambda run: run.predict(run.train_dataset),
        lambda run: run.evaluate(run.train_dataset),
        lambda run: run.log({"loss": 1.0}),
    ],
    ids=["predictions", "metrics", "logs"],
)
def test_what_was_shown_of_private_records_marks_the_run_for_good(make_trainer, show):
    run = make_trainer(log_private_statistics=True)
    show(run)
    run.args.log_private_statistics = False
    (reason,) = run.privacy_statement().not_private_because
    assert reason.startswith("log_private_statistics")


def test_another_training_dataset_is_refused(make_trainer):
    run = make_trainer()
    run.train_dataset = pairs(64, seed=1)
    with pytest.raises(ValueError, match="made for another train_dataset"):
        run.train()


def test_evaluating_on_the_private_records_is_refused(make_trainer):
    run = make_trainer()
    with pytest.raises(ValueError, match="private training dataset"):
        run.evaluate(run.train_dataset)


@pytest.mark.parametrize("wrap", [lambda d: {"train": d}, lambda d: DatasetDict(train=d)], ids=["dict", "DatasetDict"])
def test_private_records_among_several_evaluation_datasets_are_refused(tmp_path, wrap):
    dataset = pairs(64)
    with pytest.raises(ValueError, match="private training dataset"):
        DPCLIPTrainer(tiny_clip(), arguments(tmp_path), train_dataset=dataset, eval_dataset=wrap(dataset))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"some": d}], ids=["dataset", "dict"])
def test_private_records_that_are_set_for_evaluation_later_are_refused(tmp_path, wrap):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    run = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64), eval_dataset=pairs(8))
    run.eval_dataset = wrap(run.train_dataset)
    for evaluate in (run.evaluate, run.train):
        with pytest.raises(ValueError, match="private training dataset"):
            evaluate()


def test_more_steps_than_planned_are_refused(make_trainer):
    """The ledger allowed those that were planned."""
    run = make_trainer(max_steps=2)
    run.args.max_steps = 3
    with pytest.raises(ValueError, match=r"3 steps are asked for, and 2 were planned .* call trainer\.begin_run"):
        run.train()
    run.begin_run()
    run.train()
    assert run.privacy_spent().steps == 3


def test_several_splits_are_no_training_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"several splits \(train\)"):
        DPCLIPTrainer(tiny_clip(), arguments(tmp_path), train_dataset=DatasetDict(train=pairs(64)))


# ---- What sees the gradient or the data before the noise ----


def test_optimizers_in_the_backward_pass_are_refused(make_trainer):
    run = make_trainer()
    next(run.model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="a hook on a parameter"):
        run.train()


def test_watching_gradients_is_refused(make_trainer):
    run = make_trainer()
    next(run.model.parameters()).register_hook(lambda gradient: None)
    with pytest.raises(ValueError, match="WANDB_WATCH"):
        run.train()


class Watching(TrainerCallback):
    """As trackers do when they are told that training begins, which the trainer's own callback is told first."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.register_hook(self.seen.append)


def test_watching_gradients_from_a_later_callback_is_refused_before_one_is_seen(make_trainer):
    run, watching = make_trainer(), Watching()
    run.add_callback(watching)
    with pytest.raises(ValueError, match="WANDB_WATCH"):
        run.train()
    assert watching.seen == []


@pytest.mark.parametrize("setting", ["", "1", "true"])
def test_comet_which_logs_losses_by_itself_is_refused(tmp_path, monkeypatch, setting):
    monkeypatch.setenv("COMET_AUTO_LOG_METRICS", setting)
    with pytest.raises(ValueError, match="COMET_AUTO_LOG_METRICS=0"):
        arguments(tmp_path, report_to=["comet_ml"])


@pytest.mark.parametrize("setting", ["0", "False"])
def test_comet_is_allowed_where_it_logs_what_it_is_given(tmp_path, monkeypatch, setting):
    monkeypatch.setenv("COMET_AUTO_LOG_METRICS", setting)
    assert arguments(tmp_path, report_to=["comet_ml"]).report_to == ["comet_ml"]


class RememberingLoss(nn.Module):
    """Compares records with the mean of those before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, outputs, labels=None, **kwargs):
        self.mean.copy_(outputs["seen"])
        return outputs["loss"]

    def by_another_name(self, *args, **kwargs):
        return self(*args, **kwargs)


class ShowsRecords(Given):
    def forward(self, vector, labels=None):
        return {**super().forward(vector), "seen": vector.mean(0)}


@pytest.mark.parametrize(
    "of", [lambda loss: loss, lambda loss: loss.forward, lambda loss: loss.by_another_name, functools.partial]
)
def test_losses_that_remember_the_data_are_refused(tmp_path, of):
    function, args = of(RememberingLoss()), arguments(tmp_path, max_steps=5)
    records = vectors(*[[1.0] * 4] * 8)
    run = DPCLIPTrainer(ShowsRecords(), args, train_dataset=records, compute_loss_func=function)
    with pytest.raises(RuntimeError, match="a buffer of the model or of the loss changed"):
        run.train()
    assert run.state.global_step == 0


class CallableLoss:
    """Holds the module without being one."""

    def __init__(self):
        self.criterion = RememberingLoss()

    def __call__(self, outputs, labels=None, **kwargs):
        return self.criterion(outputs)


def with_criterion(outputs, labels=None, criterion=None, **kwargs):
    return criterion(outputs)


class Helper:
    """Cannot be called, but its method can."""

    def __init__(self):
        self.criteria = [RememberingLoss()]

    def loss(self, outputs, labels=None, **kwargs):
        return self.criteria[0](outputs)


def closing_over(criterion):
    return lambda outputs, labels=None, **kwargs: criterion(outputs)


def of_criterion(criterion, outputs, labels=None, **kwargs):
    return criterion(outputs)


OF_FUNCTION, OF_DEFAULT, OF_KEYWORD, OF_TRAINER, OF_METHOD = (RememberingLoss() for _ in range(5))


class WithMethod:
    """Holds nothing, but its method uses a variable of the file."""

    def loss(self, outputs, labels=None, **kwargs):
        return OF_METHOD(outputs)


def with_variable_of_the_file(outputs, labels=None, **kwargs):
    return OF_FUNCTION(outputs)


def with_default(outputs, labels=None, criterion=OF_DEFAULT, **kwargs):
    return criterion(outputs)


def with_keyword_default(outputs, labels=None, *, criterion=OF_KEYWORD, **kwargs):
    return criterion(outputs)


def closing_over_a_dictionary():
    criteria = OrderedDict(mean=RememberingLoss())
    return lambda outputs, labels=None, **kwargs: criteria["mean"](outputs)


HOLDERS = {
    "object": CallableLoss(),
    "method": Helper().loss,
    "partial": functools.partial(with_criterion, criterion=RememberingLoss()),
    "closure": closing_over(RememberingLoss()),
    "closure over a method": closing_over(Helper().loss),
    "closure over a module's method": closing_over(RememberingLoss().by_another_name),
    "closure over an object": closing_over(CallableLoss()),
    "closure over a partial": closing_over(functools.partial(of_criterion, RememberingLoss())),
    "method with a variable of the file": WithMethod().loss,
    "variable of the file": with_variable_of_the_file,
    "default": with_default,
    "default of a keyword": with_keyword_default,
    "kind of dictionary": closing_over_a_dictionary(),
}


CHANGED = r"a buffer of the model or of the loss changed|a module that the trainer holds, or its loss uses, changed"


@pytest.mark.parametrize("function", HOLDERS.values(), ids=HOLDERS)
def test_losses_that_hold_what_remembers_the_data_are_refused(tmp_path, function):
    args, records = arguments(tmp_path, max_steps=5), vectors(*[[1.0] * 4] * 8)
    run = DPCLIPTrainer(ShowsRecords(), args, train_dataset=records, compute_loss_func=function)
    with pytest.raises(RuntimeError, match=CHANGED):
        run.train()


@pytest.mark.parametrize(
    "of",
    [
        lambda criterion: criterion,
        lambda criterion: criterion.by_another_name,
        lambda criterion: functools.partial(with_criterion, criterion=criterion),
        lambda criterion: functools.partial(of_criterion, criterion),
    ],
    ids=["module", "method", "partial", "partial by position"],
)
def test_the_loss_is_in_use_and_not_among_what_may_change_between_steps(make_trainer, of):
    criterion = RememberingLoss()
    run = make_trainer(ShowsRecords(), vectors(*[[1.0] * 4] * 8), {"compute_loss_func": of(criterion)})
    # As on several processes.
    run.model_wrapped = nn.ModuleList([run.model])
    run.teacher = Given()
    in_use, held = map(list, modules_in_use(run))
    assert in_use == [run.model, criterion] and held == [run.teacher]


class WithCriterion(DPCLIPTrainer):
    """The usual way to bring a loss of one's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = RememberingLoss()

    def compute_loss(self, model, inputs, *args, **kwargs):
        return self.criterion(model(**inputs))


class WithCriteria(WithCriterion):
    """In a dictionary."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criteria = {"mean": self.criterion}
        del self.criterion

    def compute_loss(self, model, inputs, *args, **kwargs):
        return self.criteria["mean"](model(**inputs))


class WithVariable(DPCLIPTrainer):
    """Of the file."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return OF_TRAINER(model(**inputs))


@pytest.mark.parametrize("kind", [WithCriterion, WithCriteria, WithVariable])
def test_trainers_that_hold_what_remembers_the_data_are_refused(tmp_path, kind):
    run = kind(ShowsRecords(), arguments(tmp_path, max_steps=5), train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(RuntimeError, match="a module that the trainer holds, or its loss uses, changed"):
        run.train()
    assert run.state.global_step == 0


class LoggingLoss(DPCLIPTrainer):
    """As is usual for a loss of several parts."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.log({"distance": loss.item()})
        return loss


def test_logging_the_loss_of_private_records_is_refused(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    run = LoggingLoss(Given(), args, train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(RuntimeError, match=r"distance would be logged .* without noise"):
        run.train()
    assert not any("distance" in entry for entry in run.state.log_history)
    # Neither between steps nor of public data.
    run.log({"temperature": 1.0})
    public = arguments(tmp_path, max_steps=2, log_private_statistics=True)
    run = LoggingLoss(Given(), public, train_dataset=vectors(*[[1.0] * 4] * 8))
    run.train()
    assert any("distance" in entry for entry in run.state.log_history)


class Averaging(TrainerCallback):
    """Updates between steps what the trainer holds."""

    def __init__(self, average):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def test_a_loss_whose_variable_was_deleted_is_no_obstacle(tmp_path):
    unused = closing_over(None)
    del unused.__closure__[0].cell_contents

    def loss(outputs, labels=None, **kwargs):
        return outputs["loss"] if labels is None else unused(outputs)

    args, records = arguments(tmp_path, max_steps=2), vectors(*[[1.0] * 4] * 8)
    run = DPCLIPTrainer(ShowsRecords(), args, train_dataset=records, compute_loss_func=loss)
    run.train()
    assert run.state.global_step == 2


def test_what_a_loss_closes_over_may_change_between_steps(make_trainer):
    """As the teacher of a distillation does, which is an average of the model."""
    model = ShowsRecords()
    average = AveragedModel(model)
    run = make_trainer(
        model, vectors(*[[1.0] * 4] * 8), {"compute_loss_func": closing_over(lambda o: o["loss"] + 0 * total(average))}
    )
    run.add_callback(Averaging(average))
    run.train()
    assert average.n_averaged == 2


def total(module):
    return sum(parameter.sum() for parameter in module.parameters()).detach()


class Unlike:
    """Fails when it is asked for anything, as proxies of what is gone do."""

    def __getattr__(self, name):
        raise KeyError(name)

    __class__ = property(lambda self: 1 / 0)

    def __call__(self):
        return 0


def test_what_cannot_be_looked_into_is_no_obstacle(make_trainer):
    gone = Unlike()
    run = make_trainer(
        ShowsRecords(), vectors(*[[1.0] * 4] * 8), {"compute_loss_func": closing_over(lambda o: o["loss"] + gone())}
    )
    run.train()
    assert run.state.global_step == 2


def test_what_a_trainer_holds_may_change_between_steps(tmp_path):
    run = DPCLIPTrainer(Given(), arguments(tmp_path, max_steps=3), train_dataset=vectors(*[[1.0] * 4] * 8))
    run.average = AveragedModel(run.model)
    next(run.average.parameters()).register_hook(lambda gradient: None)
    run.add_callback(Averaging(run.average))
    run.train()
    assert run.average.n_averaged == 3


def draws_by_length(records):
    """A transform that draws more random numbers for a longer caption."""
    torch.rand(len(records["text"][0]))
    return records


def generator_after_construction(tmp_path, caption):
    records = with_texts([caption, *["a cat"] * 15])
    torch.manual_seed(0)
    DPCLIPTrainer(
        tiny_clip(),
        arguments(tmp_path),
        train_dataset=records.with_transform(draws_by_length),
        processing_class=tiny_processor(),
    )
    return torch.get_rng_state()


def test_what_is_drawn_for_the_first_record_does_not_show(tmp_path):
    """It is read when the trainer is made."""
    short, long = (generator_after_construction(tmp_path, caption) for caption in ("u", "a red dog"))
    assert torch.equal(short, long)


def test_how_many_records_a_unit_has_is_not_logged(tmp_path):
    """It would follow from the samples per second, the runtime and the number of epochs."""
    records = pairs(66).add_column("patient", [*range(33)] * 2)
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, privacy_unit_column="patient")
    run = DPCLIPTrainer(tiny_clip(), args, train_dataset=records)
    run.train()
    (last,) = [entry for entry in run.state.log_history if "train_samples_per_second" in entry]
    assert last["train_runtime"] * last["train_samples_per_second"] == pytest.approx(2 * 33, rel=0.02)
    assert run.num_examples(run.get_eval_dataloader(pairs(5))) == 5


class Queue(Given):
    """Keeps the last vector that it saw, as a momentum queue does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, vector, labels=None):
        self.queue.copy_(vector.mean(0))
        return super().forward(vector)


class HiddenQueue(Queue):
    """The same past the count of changes that torch keeps."""

    def forward(self, vector, labels=None):
        self.queue.data.copy_(vector.mean(0))
        return Given.forward(self, vector)


class FrozenQueue(Given):
    """The same in a parameter that is not trained, and saved with the weights."""

    def __init__(self):
        super().__init__()
        self.queue = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, vector, labels=None):
        self.queue.copy_(vector.mean(0))
        return super().forward(vector)


class ReplacedQueue(FrozenQueue):
    """The same, put in the place of the former."""

    def forward(self, vector, labels=None):
        self.queue = nn.Parameter(vector.mean(0).detach(), requires_grad=False)
        return Given.forward(self, vector)


class LateQueue(Given):
    """The same, made in the first forward pass."""

    def forward(self, vector, labels=None):
        self.queue = nn.Parameter(vector.mean(0).detach(), requires_grad=False)
        return super().forward(vector)


class Renormalised(Given):
    """Writes to a trained parameter, as an embedding with `max_norm` does to the rows that it looks up."""

    def forward(self, vector, labels=None):
        with torch.no_grad():
            self.weight.add_(vector.mean(0))
        return super().forward(vector)


@pytest.mark.parametrize(
    "kind, refusal",
    [
        (Queue, "keeps statistics of the private data"),
        (HiddenQueue, "keeps statistics of the private data"),
        (FrozenQueue, "carries private data past the mechanism"),
        (ReplacedQueue, "put in the place of another"),
        (LateQueue, "a parameter was added"),
    ],
)
def test_models_that_remember_the_data_are_refused(kind, refusal, tmp_path):
    model = kind()
    run = DPCLIPTrainer(model, arguments(tmp_path, max_steps=5), train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(RuntimeError, match=refusal):
        run.train()
    assert model.weight.abs().max() == 0


def test_trained_parameters_that_the_forward_pass_writes_to_are_refused(tmp_path):
    model = Renormalised()
    run = DPCLIPTrainer(model, arguments(tmp_path, max_steps=5), train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(RuntimeError, match="carries private data past the mechanism"):
        run.train()
    assert run.state.global_step == 0


def test_embeddings_that_are_renormalised_are_refused(make_trainer):
    run = make_trainer()
    run.model.text_model.embeddings.token_embedding.max_norm = 1.0
    with pytest.raises(ValueError, match=r"token_embedding has max_norm=1.0"):
        run.train()


def test_another_privacy_unit_midway_is_refused(tmp_path):
    dataset = pairs(64).add_column("patient", [index % 32 for index in range(64)])
    run = DPCLIPTrainer(tiny_clip(), arguments(tmp_path, max_steps=1), train_dataset=dataset)
    run.args.privacy_unit_column = "patient"
    run.begin_run()
    run.train()
    run.args.privacy_unit_column = None
    with pytest.raises(ValueError, match="makes the privacy unit 'record', and steps were taken with 'patient'"):
        run.begin_run()
    assert run.plan.privacy_unit == "patient" and run.privacy_statement().steps == 1


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_starting_weights_from_records_are_warned_of(tmp_path, caplog, method):
    model = lora_clip()
    model.peft_config["default"].init_lora_weights = method
    with caplog.at_level("WARNING"):
        DPCLIPTrainer(model, arguments(tmp_path), train_dataset=pairs(64))
    assert f"init_lora_weights='{method}' computes the starting weights of LoRA from records" in caplog.text


def test_other_starting_weights_are_not(tmp_path, caplog):
    DPCLIPTrainer(lora_clip(), arguments(tmp_path), train_dataset=pairs(64))
    assert "starting weights" not in caplog.text


def test_printing_activations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prints activations"):
        arguments(tmp_path, debug="underflow_overflow")


def test_resuming_before_the_last_checkpoint_says_what_is_not_counted(make_trainer, tmp_path, caplog):
    saving = {"max_steps": 3, **SAVING}
    make_trainer(**saving).train()
    with caplog.at_level("WARNING"):
        make_trainer(**saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "checkpoint-2, checkpoint-3 beside" in caplog.text


# ---- How a step may fail, and what is left of it ----


class StartsFromItsFirstBatch(nn.Module):
    """As ActNorm does: what it is initialised with are the records of a microbatch."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 1)
        self.begun = False

    def forward(self, vector, labels=None):
        if not self.begun:
            self.begun = True
            with torch.no_grad():
                self.centre.copy_(vector.mean(0))
        return {"loss": self.head(vector - self.centre).square().mean()}


def test_weights_that_a_refused_training_left_private_data_in_are_not_private(tmp_path):
    model, records = StartsFromItsFirstBatch(), vectors(*[[1.0] * 4] * 8)
    run = DPCLIPTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=records)
    with pytest.raises(RuntimeError, match="written to in the forward or backward pass"):
        run.train()
    run.save_model(tmp_path / "saved")
    assert "changed past the mechanism" in PrivacyStatement.load(tmp_path / "saved").not_private_because[0]
    # Now it changes no more, but what it holds is private.
    copied = copy.deepcopy(model)
    others = [lambda start=start: DPCLIPTrainer(start, run.args, train_dataset=records) for start in (model, copied)]
    for again in (run.train, *others):
        with pytest.raises(ValueError, match="still holds private data: load it anew"):
            again()


def test_so_are_those_of_a_training_that_was_interrupted_before_the_check(tmp_path):
    class Interrupted(StartsFromItsFirstBatch):
        def forward(self, vector, labels=None):
            super().forward(vector)
            raise KeyboardInterrupt

    run = DPCLIPTrainer(Interrupted(), arguments(tmp_path), train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.privacy_statement().not_private_because


@pytest.mark.parametrize("event", ["on_step_begin", "on_optimizer_step", "on_step_end"])
def test_an_error_elsewhere_leaves_the_weights_private(make_trainer, event):
    class Failing(TrainerCallback):
        pass

    def fail(self, args, state, control, **kwargs):
        raise KeyboardInterrupt

    setattr(Failing, event, fail)
    run = make_trainer(trainer_options={"callbacks": [Failing()]})
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.privacy_statement().not_private_because == ()
    run.pop_callback(Failing)
    run.train()


class RunsOutOfMemory(Given):
    def forward(self, vector, labels=None):
        if len(vector) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(vector)


class LeavesOutWhatFails(DPCLIPTrainer):
    """As scripts do that go on with the next batch where one does not fit into memory."""

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            return torch.zeros(())


@pytest.mark.parametrize("drawn, fails", [([[0, 1, 2, 3], [4, 5, 6, 7]], False), ([[0, 1, 2, 3, 8], [4, 5, 6]], True)])
def test_a_step_of_which_a_part_was_left_out_is_not_released(tmp_path, monkeypatch, drawn, fails):
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [np.array(each) for each in drawn])
    args, records = arguments(tmp_path, max_steps=1, microbatch_size=4), vectors(*[[1.0] * 4] * 9)
    run = LeavesOutWhatFails(RunsOutOfMemory(), args, train_dataset=records)
    if fails:
        with pytest.raises(RuntimeError, match="1 forward passes, of which 0 came to an end, instead of 1"):
            run.train()
    else:
        run.train()
    assert run.privacy_spent().steps == (0 if fails else 1)


class FailsOnce(Given):
    failed = False

    def forward(self, vector, labels=None):
        if not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(vector)


class TriesAgain(DPCLIPTrainer):
    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            return super().training_step(*args, **kwargs)


def test_a_step_of_which_a_part_was_repeated_is_not_released(tmp_path):
    """What the first try had added to the sum is in it still."""
    run = TriesAgain(FailsOnce(), arguments(tmp_path), train_dataset=vectors(*[[1.0] * 4] * 8))
    with pytest.raises(RuntimeError, match="2 forward passes, of which 1 came to an end, instead of 1"):
        run.train()


class LearnedTemperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, labels=None, **kwargs):
        return self.scale * outputs["loss"]


def test_a_loss_that_could_be_trained_beside_the_model_is_refused(tmp_path):
    records, args = vectors(*[[1.0] * 4] * 8), arguments(tmp_path)
    with pytest.raises(ValueError, match="the loss has trainable parameters that are not the model's"):
        DPCLIPTrainer(Given(), args, train_dataset=records, compute_loss_func=LearnedTemperature()).train()
    frozen = LearnedTemperature().requires_grad_(False)
    DPCLIPTrainer(Given(), args, train_dataset=records, compute_loss_func=frozen).train()


class WithCritic(DPCLIPTrainer):
    """A trainer that holds a module of its own beside the model."""

    without_gradient = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.set_grad_enabled(not self.without_gradient):
            factor = self.critic(torch.ones(2)).sum()
        return factor * model(**inputs)["loss"]


def with_critic(tmp_path, critic, model=None, **options):
    args, records = arguments(tmp_path, max_steps=3), vectors(*[[1.0] * 4] * 8)
    run = WithCritic(model or Given(), args, train_dataset=records, **options)
    run.critic = critic
    return run


def test_modules_of_the_trainer_that_get_a_gradient_without_noise_are_refused(tmp_path):
    run = with_critic(tmp_path, nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="received a gradient that is neither clipped nor noised"):
        run.train()
    assert run.privacy_spent().steps == 0


class TrainedOnPublicData(TrainerCallback):
    """Between steps, which is allowed."""

    def __init__(self, critic):
        self.critic, self.optimizer = critic, torch.optim.SGD(critic.parameters(), lr=0.1)

    def on_step_end(self, *args, **kwargs):
        self.optimizer.zero_grad()
        self.critic(torch.ones(2)).sum().backward()
        self.optimizer.step()


def test_modules_that_are_trained_on_public_data_between_steps_are_allowed(tmp_path):
    critic = nn.Linear(2, 1)
    run = with_critic(tmp_path, critic, callbacks=[TrainedOnPublicData(critic)])
    run.without_gradient = True
    run.train()
    assert run.privacy_spent().steps == 3


class Remembers(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.bias.add_(1)
        return super().forward(x)


def test_a_module_of_the_trainer_that_changed_is_not_taken_again(tmp_path):
    critic = Remembers(2, 1).requires_grad_(False)
    with pytest.raises(RuntimeError, match="a module that the trainer holds"):
        with_critic(tmp_path, critic).train()
    with pytest.raises(ValueError, match="still holds private data"):
        with_critic(tmp_path, critic).train()


def test_nor_is_a_loss_of_buffers_alone(tmp_path):
    loss, records = RememberingLoss(), vectors(*[[1.0] * 4] * 8)

    def run():
        return DPCLIPTrainer(ShowsRecords(), arguments(tmp_path), train_dataset=records, compute_loss_func=loss)

    with pytest.raises(RuntimeError, match="a buffer of the model or of the loss changed"):
        run().train()
    with pytest.raises(ValueError, match="still holds private data"):
        run().train()


def test_one_that_did_not_change_is_taken_again(tmp_path):
    critic = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(RuntimeError, match="written to in the forward or backward pass"):
        with_critic(tmp_path, critic, StartsFromItsFirstBatch()).train()
    with_critic(tmp_path, critic).train()


def test_weights_that_are_saved_within_a_step_that_will_be_refused_are_not_private(tmp_path, monkeypatch):
    # No pass without records, in which nothing would change.
    drawn = [np.arange(4), np.arange(4, 8)]
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: drawn)

    class Saving(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            run.save_model(tmp_path / "within")

    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    records = vectors(*[[1.0] * 4] * 8)
    model, args = StartsFromItsFirstBatch(), arguments(tmp_path, **settings)
    run = DPCLIPTrainer(model, args, train_dataset=records, callbacks=[Saving()])
    other = DPCLIPTrainer(model, args, train_dataset=records)
    with pytest.raises(RuntimeError, match="written to"):
        run.train()
    other.save_model(tmp_path / "other")
    for folder in ("within", "other"):
        assert PrivacyStatement.load(tmp_path / folder).not_private_because


def test_what_is_done_to_the_model_after_the_last_step_is_not_judged(tmp_path):
    class Merging(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.merge_and_unload()

    run = DPCLIPTrainer(lora_clip(), arguments(tmp_path), train_dataset=pairs(64), callbacks=[Merging()])
    run.train()
    assert run.privacy_statement().not_private_because == ()


def test_a_model_that_is_made_anew_after_a_refusal_is_trained_though_the_run_stays_marked(tmp_path):
    models = iter([Given(), StartsFromItsFirstBatch(), Given()])
    records = vectors(*[[1.0] * 4] * 8)
    run = DPCLIPTrainer(None, arguments(tmp_path), train_dataset=records, model_init=lambda: next(models))
    with pytest.raises(RuntimeError, match="written to in the forward or backward pass"):
        run.train()
    run.train()
    assert run.privacy_spent().steps == 2 and run.privacy_statement().not_private_because


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_a_model_that_is_made_anew_after_an_interruption_is_trained(tmp_path, event):
    class Interrupting(TrainerCallback):
        pass

    def interrupt(self, args, state, control, **kwargs):
        raise KeyboardInterrupt

    setattr(Interrupting, event, interrupt)
    options = {"model_init": lambda: tiny_clip(), "callbacks": [Interrupting()]}
    run = DPCLIPTrainer(None, arguments(tmp_path), train_dataset=pairs(64), **options)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(Interrupting)
    run.train()
    assert run.privacy_statement().not_private_because == ()


def test_an_optimizer_that_is_given_more_to_train_later_is_refused(make_trainer):
    class Extending(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(())))

    run = make_trainer()
    run.add_callback(Extending())
    with pytest.raises(ValueError, match="trainable parameters that are not the model's"):
        run.train()
    assert run.privacy_spent().steps == 0


@pytest.mark.parametrize("method", ["get_batch_samples", "_get_train_sampler"])
def test_choosing_among_the_drawn_batches_is_refused(tmp_path, method):
    """One that leaves out empty batches would take as many steps as there are others."""

    class Chooses(DPCLIPTrainer):
        pass

    setattr(Chooses, method, lambda self, *args: getattr(super(Chooses, self), method)(*args))
    with pytest.raises(ValueError, match=f"{method} is overridden"):
        Chooses(tiny_clip(), arguments(tmp_path), train_dataset=pairs(64))


def test_stopping_at_a_gradient_that_is_not_finite_is_refused(make_trainer):
    run = make_trainer()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="anomaly mode"):
        run.train()
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run.train()


def test_another_privacy_unit_after_a_run_without_steps_is_refused(make_trainer):
    run = make_trainer(train_dataset=pairs(64).add_column("patient", list(range(64))))
    run.train()
    run.begin_run()
    run.args.privacy_unit_column = "patient"
    with pytest.raises(ValueError, match="steps were taken with 'record'"):
        run.begin_run()
