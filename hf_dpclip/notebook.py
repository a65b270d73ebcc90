"""The progress table of notebooks, with ε. Needs IPython, which notebooks have."""

from transformers.utils.notebook import NotebookProgressCallback

from .privacy_section import NOT_PRIVATE


class PrivacyNotebookProgressCallback(NotebookProgressCallback):
    """The usual table with a column for ε, and a line for every log even where there is no training loss to show."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The last log, of the whole run, has no loss of single steps.
        if args.eval_strategy == "no" and self.training_tracker is not None and "train_runtime" not in logs:
            loss = logs.get("loss", "private")
            epsilon = NOT_PRIVATE if NOT_PRIVATE in logs else logs.get("epsilon", "none")
            self.training_tracker.write_line({"Training Loss": loss, "Step": state.global_step, "Epsilon": epsilon})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics = dict(metrics or {})
        if not args.log_private_statistics:
            # A metric of this name goes into the column "Training Loss", in place of "No log".
            metrics["eval_Training_Loss"] = "private"
        # The last log is that of this evaluation, and has the current ε.
        if "epsilon" in state.log_history[-1]:
            metrics["eval_epsilon"] = state.log_history[-1]["epsilon"]
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
