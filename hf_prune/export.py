"""Export: a pruned model for ONNX Runtime, in float32 or with int8 weights, checked before written.

The graph comes from the exporter of transformers, with any batch size and length. Decoders are
exported without their cache.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from hf_prune.checkpoint.folder import staged_folder
from hf_prune.errors import ConfigError, NumericsError
from hf_prune.statistics.example import example_batch

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What an export needs, beside a transformers that has an exporter: the extra `onnx`."""
FLOAT, INT8 = "model.onnx", "model_int8.onnx"
"""The files of an export."""
TOLERANCE = 1e-3
"""Largest difference of the exported graph, relative to the largest output."""


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"export needs {', '.join(missing)}. Run: pip install 'hf_prune[onnx]'")
    if find_spec("transformers.exporters") is None:
        raise ConfigError("export needs the exporters of transformers: pip install -U transformers")


class OnnxModel(nn.Module):
    """An exported model in ONNX Runtime on the CPU, called like the model that it was made from.

    Args:
        path: of the graph.
        model: that it was made from: its config says what inputs look like.
        threads: of one operation; as many as torch has, if not given.
    """

    def __init__(self, path: Path, model: PreTrainedModel, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.config, self.main_input_name = model.config, model.main_input_name
        self.folder: Any = None

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return torch.device("cpu")

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """The outputs by name. Inputs that the graph does not have are left out."""
        given = {name: inputs[name].numpy() for name in self.inputs}
        found = self.session.run(self.outputs, given)
        return ModelOutput(
            **{k: torch.from_numpy(v) for k, v in zip(self.outputs, found, strict=True)}
        )


@contextmanager
def _for_export(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy in eval mode on the CPU, without a cache."""
    copied = copy.deepcopy(model).eval()
    nn.Module.to(copied, device="cpu", dtype=torch.float32)
    for config in {id(c): c for c in (copied.config, copied.config.get_text_config())}.values():
        if hasattr(config, "use_cache"):
            config.use_cache = False
    yield copied


def _difference(model: PreTrainedModel, path: Path) -> float:
    """Of the graph from the model, on a batch of another shape than it was traced with."""
    batch = example_batch(model, 3, 9)
    with torch.inference_mode():
        wanted, found = model(**batch)[0], OnnxModel(path, model)(**batch)[0]
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _write(model: PreTrainedModel, folder: Path, *, int8: bool) -> float:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    with _for_export(model) as copied:
        made = OnnxExporter().export(
            copied, dict(example_batch(copied, 2, 16)), config=OnnxConfig(dynamic=True)
        )
        made.save_pretrained(str(folder))
        off = _difference(copied, folder / FLOAT)
        if not off <= TOLERANCE:
            raise NumericsError(
                f"the exported graph gives other outputs than {type(model).__name__}: they differ "
                f"by {off:.2g} of the largest one. Nothing was written."
            )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(folder / FLOAT, folder / INT8, weight_type=QuantType.QInt8)
    return off


def export_onnx(
    model: PreTrainedModel,
    out: "str | Path",
    *,
    int8: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> float:
    """Write a model as an ONNX graph, all of it or nothing.

    Args:
        model: pruned or not; not changed. Exported in float32.
        out: folder: `model.onnx` with its weights, the config, and `model_int8.onnx`.
        int8: also write a graph whose weights are int8, with activations scaled as they come.
        tokenizer: saved beside it.
        overwrite: replace an existing folder.

    Returns:
        The largest difference of the outputs from the model's, relative to the largest, on a batch
        of another shape than that of the trace.

    Raises:
        ConfigError: when onnx, onnxscript or onnxruntime is not installed.
        NumericsError: when the graph gives other outputs: nothing was written.
        OutputExistsError: when `out` exists and `overwrite` is off: nothing was written.
    """
    _check_packages()
    with staged_folder(Path(out), overwrite=overwrite) as folder:
        off = _write(model, folder, int8=int8)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return off


def export_folder(
    source: str, out: "str | Path", *, int8: bool = False, overwrite: bool = False
) -> float:
    """`export_onnx` of a saved model, by the class that its config names, with its tokenizer.

    Args:
        source: folder, or name on the Hub.
        out: as in `export_onnx`.
        int8: as in `export_onnx`.
        overwrite: as in `export_onnx`.
    """
    config = AutoConfig.from_pretrained(source)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ConfigError(f"{source}: the config names no class of transformers: {names!r}.")
    tokenizer = None
    with suppress(OSError, ValueError):  # there may be none
        tokenizer = AutoTokenizer.from_pretrained(source)
    model = model_class.from_pretrained(source)
    return export_onnx(model, out, int8=int8, tokenizer=tokenizer, overwrite=overwrite)


def onnx_int8(model: PreTrainedModel) -> OnnxModel:
    """A model in ONNX Runtime with int8 weights: for `four_corners(..., quantize=onnx_int8)`.

    Raises:
        ConfigError: as `export_onnx`.
        NumericsError: as `export_onnx`.
    """
    _check_packages()
    folder = tempfile.TemporaryDirectory()
    _write(model, Path(folder.name), int8=True)
    made = OnnxModel(Path(folder.name) / INT8, model)
    made.folder = folder  # it goes with the model
    return made
