"""What runs, and on what: a whole module, or one layer of it, on one batch after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.statistics.batches import (
    Batch,
    decoder_mask,
    forward_kwargs,
    to_device,
    token_mask,
)
from hf_prune.weights.find import Matrix
from hf_prune.weights.inputs import (
    Replay,
)

Inputs = Tensor | tuple[Tensor, ...] | Batch
"""One batch of any module: the only argument, the arguments, or the keyword arguments."""


@dataclass(frozen=True)
class Real:
    """Which tokens of one batch are real, `[B, T]`; None, where nothing says so.

    An encoder and a decoder read two sequences; `cross` are the modules of the decoder that read
    that of the encoder. It is None where there is only one sequence.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    cross: frozenset[str] | None = None

    def of(self, module: str) -> Tensor | None:
        """For what a module sees; of a module outside of both, what the decoder gives."""
        if self.cross is None or module in self.cross:
            return self.tokens
        side = next((part for part in module.split(".") if part in ("encoder", "decoder")), "")
        return self.tokens if side == "encoder" else self.decoder


@dataclass
class Block:
    """Something that both networks can run alone on every batch: one layer, or all of a model.

    `prefix` turns a module's name into its name within the block. `sums` are by such names. The
    dense network is read, and needed, only where it is the target.
    """

    prefix: str
    dense: nn.Module | None
    pruned: nn.Module
    run_dense: Callable[[int], Any]
    run_pruned: Callable[[int], Any]
    real: Sequence[Real]
    sums: Mapping[str, str] = field(default_factory=dict)
    keep_traces: bool = False
    replay: Replay = field(default_factory=Replay)
    done: list[str] = field(default_factory=list)
    """Linear modules that are pruned and will not change any more."""

    def local(self, module: str) -> str:
        """A module's name within the block."""
        return module.removeprefix(self.prefix).removeprefix(".")

    def holders(self, matrix: Matrix) -> list[str]:
        """Names within the block of all modules in it that have a matrix."""
        start = f"{self.prefix}." if self.prefix else ""
        others = [name for name in matrix.others if name.startswith(start)]
        return [self.local(name) for name in (matrix.module, *others)]


def call_model(model: nn.Module, batch: Inputs) -> Any:
    """Run any module on one batch, without labels."""
    if isinstance(model, PreTrainedModel) and isinstance(batch, Mapping):
        # where there is a decoder of its own, its inputs are made from the labels
        labels = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
        return model(**forward_kwargs(model, to_device(batch, model.device), labels=labels))
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _readers_of_encoder(model: PreTrainedModel, batch: Batch) -> frozenset[str]:
    """The modules that are called with what the encoder gave: keys and values of a decoder."""
    given: dict[str, Tensor] = {}
    found: set[str] = set()

    def encoded(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given["encoder"] = output if isinstance(output, Tensor) else output[0]

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            if values and values[0] is given.get("encoder"):
                found.add(name)

        return hook

    handles = [model.get_encoder().register_forward_hook(encoded)]
    handles += [
        module.register_forward_pre_hook(check(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


def real_tokens(model: nn.Module, batches: Sequence[Inputs]) -> list[Real]:
    """Which tokens of each batch are real.

    Those of a decoder are told as `decoder_mask` says.
    """
    if not isinstance(model, PreTrainedModel):
        return [Real() for _ in batches]
    both, cross, result = model.config.is_encoder_decoder, None, list[Real]()
    for batch in batches:
        if not isinstance(batch, Mapping):
            result.append(Real())
        elif not both:
            # [B, choices, T] -> [B * choices, T]
            result.append(Real(token_mask(model, batch).flatten(0, -2)))
        else:
            cross = _readers_of_encoder(model, batch) if cross is None else cross
            result.append(Real(token_mask(model, batch), decoder_mask(batch), cross))
    return result
