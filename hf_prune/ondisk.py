"""Single weights of a model that does not fit into memory: pruned from disk to disk.

The model is built without memory. What stands before its layers is read, the calibration data goes
through it, and from then on one layer at a time is read, pruned, written and forgotten. Beside the
hidden states of the calibration data, memory holds one layer, its dense copy, its inputs and its
moments.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_prune.checkpoint.bitmask import VALUES
from hf_prune.checkpoint.folder import staged_folder
from hf_prune.checkpoint.manifest import MANIFEST, write_manifest
from hf_prune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    UnsupportedModelError,
)
from hf_prune.recipe import Prune, load_recipe
from hf_prune.sites import base_model, find_sites
from hf_prune.statistics.batches import Batch, take
from hf_prune.statistics.entry import first_inputs
from hf_prune.statistics.streams import Stream, by_layer
from hf_prune.surgery.description import QUANT_METHOD, TABLES
from hf_prune.weights.budgets import uniform
from hf_prune.weights.find import Matrix
from hf_prune.weights.problem import GRADIENTS
from hf_prune.weights.progress import Progress, digest_of
from hf_prune.weights.prune import Job, prune_layers
from hf_prune.weights.stage import check_weight_stage, find_stage, options_of

INDEX = "model.safetensors.index.json"


@dataclass
class _Shards:
    """Which file of a folder holds which tensor."""

    folder: Path
    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> "_Shards":
        """Read the index, or the names in the only file.

        Raises:
            CheckpointError: when there are no safetensors, or a name would leave the folder.
        """
        index = folder / INDEX
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
            for name in files.values():
                if not isinstance(name, str) or Path(name).name != name:
                    raise CheckpointError(f"{index}: {name!r} is not a file of this folder.")
            return cls(folder, files)
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{folder} has no model.safetensors and no {INDEX}.")
        with safe_open(single, framework="pt") as file:
            return cls(folder, dict.fromkeys(file.keys(), single.name))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, file by file."""
        found: dict[str, Tensor] = {}
        for shard in sorted({self.files[name] for name in names}):
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in (n for n in names if self.files[n] == shard):
                    found[name] = file.get_tensor(name)
        return found


@dataclass
class _Walk:
    """A model on its way from one folder to another."""

    model: PreTrainedModel
    shards: _Shards
    out: Path
    written: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    job: Job | None = None

    def names(self, module: str) -> list[str]:
        """Names of the parameters of a module, in the model."""
        return [n for n, _ in self.model.named_parameters() if n.startswith(f"{module}.")]

    def load(self, names: Sequence[str]) -> dict[str, torch.dtype]:
        """Put tensors into the model, in float32; their types on disk, by name.

        Raises:
            NumericsError: when a weight is not finite.
        """
        types = {}
        for name, tensor in self.shards.read(names).items():
            types[name] = tensor.dtype
            if not torch.isfinite(tensor).all():
                raise NumericsError(f"{name} has values that are not finite: nothing was written.")
            _swap(self.model.get_parameter(name), tensor.float())
        return types

    @contextlib.contextmanager
    def around(self, layer: str) -> Iterator[None]:
        """Read a layer before it is pruned; write and forget it afterwards."""
        names = self.names(layer)
        types = self.load(names)
        yield
        tensors = {n: self.model.get_parameter(n).detach().to(types[n]) for n in names}
        self.write(f"{layer}.safetensors", tensors)
        assert self.job is not None  # noqa: S101  # the walk has begun
        masks = self.job.result.masks
        self.kept |= {name: int(mask.sum()) for name, mask in masks.items()}
        masks.clear()
        for name in names:
            _swap(self.model.get_parameter(name), torch.empty(tensors[name].shape, device="meta"))

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file of the new checkpoint."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self.out / file, {"format": "pt"})
        self.written |= dict.fromkeys(tensors, file)


def _swap(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other data, on any device, and let it stay the same object."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=False))


def _check_plain(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse what the config says is no chain of plain layers."""
    stored = getattr(config, "quantization_config", None)
    told = stored if isinstance(stored, Mapping) else vars(stored) if stored is not None else {}
    if told and told.get("quant_method") != QUANT_METHOD:
        raise UnsupportedModelError(f"{folder} is quantized: prune first, then quantize.")
    if any(told.get(table) for table in TABLES):
        raise UnsupportedModelError(
            f"{folder} has lost units, and not the shapes that its class says: load the model and "
            "use compress()."
        )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{folder}: from disk to disk only models are pruned whose layers form one chain, "
            "and here a decoder reads what an encoder gave. Load the model and use compress()."
        )


def _empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder without memory for its weights, its buffers computed."""
    config = AutoConfig.from_pretrained(folder)
    _check_plain(folder, config)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise UnsupportedModelError(f"{folder}: the config names no class of transformers.")
    with torch.device("meta"):
        model = model_class(config)
    assert isinstance(model, PreTrainedModel)  # noqa: S101  # what architectures are
    kept = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    if kept:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps {min(kept)!r} beside its parameters: load the model and "
            "use compress()."
        )
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in list(module.named_buffers(recurse=False)):
                real = torch.empty_like(buffer, device="cpu")
                module.register_buffer(name, real, persistent=False)
            model._init_weights(module)
    model.eval()
    return model


def _check(model: PreTrainedModel, stage: Prune, shards: _Shards) -> None:
    """Refuse what cannot be done layer by layer, before anything is written."""
    check_weight_stage(stage)
    if stage.structural or stage.solver != "uniform" or stage.criterion in GRADIENTS:
        raise ConfigError(
            "from disk to disk only single weights are pruned, with solver: uniform and a "
            "criterion that needs no gradient."
        )
    single = stage.single
    cannot = {
        "schedule": stage.schedule is not None,
        "weights.embeddings": single.embeddings,
        "polish_steps": stage.polish_steps > 0,
        "weights.remove_dead": single.remove_dead and "remove_dead" in single.model_fields_set,
    }
    asked = [name for name, value in cannot.items() if value]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: not from disk to disk, where one layer is in memory at a time. "
            "Leave it out, or load the model and use compress()."
        )
    if any(name.endswith(VALUES) for name in shards.files):
        raise UnsupportedModelError(
            f"{shards.folder} is stored as a bitmask: load the model, and save it with "
            "storage='dense' first."
        )
    names = dict(model.named_parameters())
    missing = [name for name in names if name not in shards.files]
    others = [name for name in shards.files if name not in names]
    if missing and others:
        raise UnsupportedModelError(
            f"{shards.folder} keeps weights of {type(model).__name__} under other names than the "
            f"model has ({others[0]!r}; {missing[0]!r} is not there). Load the model and use "
            "compress()."
        )
    if missing:
        raise CheckpointError(f"{shards.folder} has no tensor {missing[0]!r}.")


@torch.no_grad()
def prune_folder(
    source: "str | Path",
    out: "str | Path",
    stage: Prune,
    calibration: Sequence[Batch],
    *,
    progress: "str | Path | None" = None,
    overwrite: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Prune single weights of a saved model without ever holding all of it.

    Matrices outside of the layers are left alone. Computed in float32; written in the type that
    each tensor has on disk.

    Args:
        source: folder with a config and safetensors, of a family whose layers pass hidden states
            on, one to the next.
        out: folder; complete or absent at any moment.
        stage: of single weights, with solver `uniform`.
        calibration: batches, dicts of tensors.
        progress: a folder in which finished layers are kept, so that an interrupted run goes on.
        overwrite: replace an existing folder.
        seed: of everything random.

    Returns:
        `total`, `removed`, `sparsity` and `mean_relative_error` of the matrices in layers;
        `resumed` layers; and `left_dense`, the names of matrices outside, as of a head or a pooler.

    Raises:
        CheckpointError: when the source is incomplete, or `progress` is of another run.
        ConfigError: for a stage that needs all of the model at once.
        UnsupportedModelError: for a model whose layers cannot be run one after the other.
    """
    source = Path(source)
    model, shards = _empty_model(source), _Shards.of(source)
    model.tie_weights()
    _check(model, stage, shards)
    layers = by_layer(find_sites(model))
    wanted = find_stage(model, stage)
    matrices = _in_layers(model, wanted, list(layers))
    options = options_of(model, stage, seed, {})
    batches = take(
        model,
        calibration,
        at_least=stage.min_calibration_samples,
        at_most=stage.calibration_samples,
    )
    key = _key(source, stage, batches, seed)
    kept = Progress(Path(progress), key) if progress is not None else None
    job = Job(uniform(matrices, stage.fraction, options.pattern), options, kept)
    with staged_folder(Path(out), overwrite=overwrite) as folder:
        walk = _Walk(model, shards, folder, job=job)
        streams = _begin(walk, batches, list(layers))
        prune_layers(model, layers, matrices, streams, job, walk.around)
        _finish(source, folder, walk)
    inside = {matrix.name for matrix in matrices}
    outside = [matrix.name for matrix in wanted if matrix.name not in inside]
    return {**_figures(matrices, walk, job), "left_dense": outside}


def _key(source: Path, stage: Prune, batches: Sequence[Batch], seed: int) -> str:
    """What a run is: its folder and the state of its files, the stage, and the calibration data."""
    files = [path for path in sorted(source.resolve().iterdir()) if path.is_file()]
    told = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{digest_of([*told, *batches])} {stage.model_dump_json()} {seed}"


def prune_folder_with_text(
    source: Path,
    out: Path,
    recipe: Path,
    text: Path,
    *,
    max_length: int = 512,
    progress: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """`prune_folder` by a recipe, calibrated on a file of text.

    Args:
        source: as in `prune_folder`, with a tokenizer.
        out: as in `prune_folder`.
        recipe: file with exactly one stage, of single weights.
        text: cut into sequences, of which the stage's `calibration_samples` are used at most.
        max_length: tokens of a sequence.
        progress: as in `prune_folder`.
        overwrite: as in `prune_folder`.

    Raises:
        ConfigError: for a recipe of another kind.
        DataError: when the text has no sequence of that length.
    """
    loaded = load_recipe(recipe)
    if len(loaded.stages) != 1 or len(loaded.prune_stages) != 1:
        raise ConfigError(f"{recipe}: from disk to disk, a recipe has one stage, of weights.")
    stage = loaded.prune_stages[0]
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    count = min(len(ids) // max_length, stage.calibration_samples)
    if not count:
        raise DataError(f"{text} has {len(ids)} tokens, less than one sequence of {max_length}.")
    rows = ids[: count * max_length].view(count, max_length)  # [sequences, T]
    return prune_folder(
        source,
        out,
        stage,
        [{"input_ids": part} for part in rows.split(4)],
        progress=progress,
        overwrite=overwrite,
        seed=loaded.seed,
    )


def _begin(walk: _Walk, batches: Sequence[Batch], layers: Sequence[str]) -> list[Stream]:
    """Copy what lies outside of the layers, and run it: what enters the first layer."""
    model = walk.model
    starts = tuple(f"{name}." for name in _layer_names(model, layers))
    rest = [name for name, _ in model.named_parameters() if not name.startswith(starts)]
    types = walk.load(rest)
    streams = first_inputs(model, batches, list(layers))
    others = {name: model.get_parameter(name).detach().to(types[name]) for name in rest}
    walk.write("rest.safetensors", others)
    return streams


def _figures(matrices: Sequence[Matrix], walk: _Walk, job: Job) -> dict[str, Any]:
    total = sum(matrix.numel for matrix in matrices)
    kept = sum(walk.kept.values())
    errors = list(job.result.errors.values())
    return {
        "total": total,
        "removed": total - kept,
        "sparsity": 1 - kept / total,
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "resumed": job.result.resumed,
    }


def _layer_names(model: PreTrainedModel, layers: Sequence[str]) -> list[str]:
    """Names of layers in the model, from those in its base model."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(base_model(model).get_submodule(layer))] for layer in layers]


def _in_layers(
    model: PreTrainedModel, matrices: Sequence[Matrix], layers: Sequence[str]
) -> list[Matrix]:
    """Those that lie in the layers.

    Raises:
        ConfigError: when there is none.
    """
    starts = tuple(f"{name}." for name in _layer_names(model, layers))
    found = [matrix for matrix in matrices if matrix.name.startswith(starts)]
    if not found:
        names = ", ".join(matrix.name for matrix in matrices[:3])
        raise ConfigError(f"from disk to disk nothing outside of layers is pruned: {names}.")
    return found


def _finish(source: Path, folder: Path, walk: _Walk) -> None:
    """Index, config, tokenizer and manifest."""
    index = {"metadata": {}, "weight_map": dict(sorted(walk.written.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    leave = (INDEX, MANIFEST)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".txt", ".model", ".jinja") and path.name not in leave
        if wanted and path.is_file():
            shutil.copyfile(path, folder / path.name)
    write_manifest(folder)
