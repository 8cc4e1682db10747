"""What an ordinary Trainer needs to be told, where callbacks cannot reach it."""

from transformers import Trainer, TrainerCallback

from hf_prune.statistics.batches import is_causal_lm


def prepare_trainer(trainer: Trainer) -> Trainer:
    """Make a Trainer weigh its losses right, and show our figures to all trackers.

    Without it training works too, but for two things. Models that take a mean over their batch,
    whatever number of items they are told, are trained by the Trainer of transformers 5 with a loss
    that grows with gradient accumulation and with processes; here it is divided as it must be. And
    reporting callbacks see a log before callbacks of the user have added to it; here ours go first.

    Returns:
        The same trainer.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_causal_lm(model) and trainer.compute_loss_func is None:
        trainer.model_accepts_loss_kwargs = False
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
    ours = [
        callback
        for callback in callbacks
        if any(kind.__module__.startswith("hf_prune.") for kind in type(callback).__mro__)
    ]
    trainer.callback_handler.callbacks = ours + [c for c in callbacks if c not in ours]
    return trainer
