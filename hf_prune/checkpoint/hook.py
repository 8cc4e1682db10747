"""The hook by which transformers loads a pruned model.

transformers lets a package register a quantizer. It is called after the model was built on `meta`
and before weights are read, which is when modules must be narrowed. After loading, its flags are
taken off again, so that the model is an ordinary one for Trainer, `.half()`, PEFT and
`torch.compile`.

Like `surgery.rebuild` and what that imports, this module is also saved beside models that are to
load without hf_prune.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune.errors import CheckpointError
from hf_prune.surgery.description import (
    PACKED,
    QUANT_METHOD,
    SHAPES_VERSION,
    TABLES,
    Shapes,
    check_shapes,
)
from hf_prune.surgery.rebuild import apply_shapes_

CONVERSIONS: list[Callable[[str], list[Any]]] = []
"""Makers of weight conversions: how weights that are not stored as they are get read. Each is given
the `packed` of the description, which may be empty."""


class HfPruneConfig(QuantizationConfigMixin):
    """The `quantization_config` of a pruned model: absolute sizes by module path.

    To quantize a pruned model while it is loaded, pass one with another configuration in it:
    `from_pretrained(folder, quantization_config=HfPruneConfig(inner=TorchAoConfig(...)))`. The
    model is quantized then, and cannot be saved: keep the folder.

    Raises:
        CheckpointError: when it is of another version, or a value is not a positive integer.
    """

    inner: QuantizationConfigMixin | None = None
    """How to quantize, after the model was narrowed. Never read from a file."""

    def __init__(self, version: Any = None, inner: Any = None, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own
        self.version = SHAPES_VERSION if version is None and inner is not None else version
        if inner is not None and not isinstance(inner, QuantizationConfigMixin):
            raise CheckpointError(f"inner is a {type(inner).__name__}, and no quantization config.")
        if inner is not None:
            self.inner = inner
        for table in ("modules", "attributes"):
            kwargs[table] = {} if kwargs.get(table) is None else kwargs[table]
        for table in TABLES:
            if table in kwargs:
                setattr(self, table, kwargs[table])
        if PACKED in kwargs:
            setattr(self, PACKED, kwargs[PACKED])
        check_shapes(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """The description as plain data. Its tables are shared: copying them would slow loading."""
        return {name: value for name, value in vars(self).items() if name != "inner"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What is taken from one that is passed to `from_pretrained`."""
        return {} if self.inner is None else {"inner": self.inner}


class _Narrowing:
    """What a quantizer becomes that has to narrow a model first."""

    shapes: dict[str, Any]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        apply_shapes_(model, self.shapes)
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]  # of the quantizer

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The quantizer's own, and ours."""
        own = super().update_weight_conversions(weight_conversions, model)  # type: ignore[misc]  # as above
        return [*own, *_conversions(self.shapes)]

    def is_serializable(self) -> bool:
        """No: its config would say how it is quantized, and no more how it was pruned."""
        return False


class HfPruneQuantizer(HfQuantizer):
    """Narrows the freshly built model; leaves an ordinary model behind."""

    requires_calibration = True

    def __new__(cls, quantization_config: HfPruneConfig, **kwargs: Any) -> Any:
        """Itself; or the quantizer that is asked for, made to narrow the model first."""
        if quantization_config.inner is None:
            return super().__new__(cls)
        plain = AutoHfQuantizer.from_config(quantization_config.inner, pre_quantized=False)
        made: Any = type(f"Narrowing{type(plain).__name__}", (_Narrowing, type(plain)), {})
        quantizer = made(plain.quantization_config, pre_quantized=False)
        quantizer.shapes = quantization_config.to_dict()
        return quantizer

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        apply_shapes_(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        shapes = self.quantization_config.to_dict()
        shapes.pop(PACKED, None)  # the model is dense from now on
        for name in ("hf_quantizer", "quantization_method"):
            with contextlib.suppress(AttributeError):
                delattr(model, name)
        _forget_conversions(model)
        model.is_quantized = False  # type: ignore[assignment]  # a plain flag
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # where transformers has put it
                vars(module.config).pop("_is_quantized", None)
        model.config.quantization_config = Shapes(shapes)
        return model

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Nothing: no module of transformers is swapped for one that another format can read."""

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own, and ours; weights have no companions such as scales."""
        return weight_conversions + self.get_weight_conversions()

    def get_weight_conversions(self) -> list[Any]:
        """How weights are read that lie in the checkpoint in another form."""
        return _conversions(vars(self.quantization_config))

    def update_parallel_plan(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: narrowed modules keep the names that a plan of parallel layers speaks of."""

    def is_serializable(self) -> bool:
        """A pruned model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A pruned model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of a model that it takes for quantized."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A pruned model can be compiled."""
        return True


def _conversions(shapes: Mapping[str, Any]) -> list[Any]:
    conversions = [item for make in CONVERSIONS for item in make(shapes.get(PACKED, ""))]
    for conversion in conversions:
        for operation in conversion.operations:
            operation.of_hf_prune = True
    return conversions


def _forget_conversions(model: PreTrainedModel) -> None:
    """Let the model be saved again as it is: transformers would undo what it did while loading."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        model._weight_conversions = [  # type: ignore[assignment]  # transformers' own attribute
            item
            for item in known
            if not any(hasattr(op, "of_hf_prune") for op in getattr(item, "operations", ()))
        ]


def register() -> None:
    """Make transformers load pruned models. Done once, when hf_prune is imported."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(HfPruneConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(HfPruneQuantizer)
        # the list of configurations that take `get_loading_attributes` of one that is passed
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (HfPruneConfig,)  # type: ignore[assignment]  # of any length
