"""What to remove, and how much: the stage `prune`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from hf_prune.errors import ConfigError
from hf_prune.recipe.model import Model
from hf_prune.recipe.schedule import Schedule
from hf_prune.recipe.target import Floor, Target, check_fraction
from hf_prune.recipe.template import Template, UniformWidth
from hf_prune.recipe.unread import unread
from hf_prune.recipe.weights import Weights

Unit = Literal["heads", "neurons", "query_heads", "experts", "expert_neurons", "hidden", "weights"]
UNITS: tuple[str, ...] = get_args(Unit)
"""The kinds of unit that a recipe can name."""
RIDGE = 1e-2
"""What `ridge` is, where a stage does not say it."""


def _default_of(structure: str, **others: str) -> Callable[[dict[str, Any]], str]:
    """The default of a field for heads and neurons, and those for other units that are alone."""
    return lambda data: others.get("".join(data.get("units", ())), structure)


def _default_criterion(data: dict[str, Any]) -> str:
    if {"experts", "expert_neurons"} & set(data.get("units", ())):
        return "fisher"
    weights = "admm" if data.get("schedule") is None else "magnitude"
    return _default_of("kfac_obs", weights=weights, hidden="fisher")(data)


class Prune(Model):
    """What to remove, and how much."""

    stage: Literal["prune"] = "prune"
    """Tells this stage from the others."""
    units: tuple[Unit, ...] = ("heads", "neurons")
    """What may go: `heads` and `neurons` are really removed, and so are channels of the `hidden`
    width of the whole model. Heads go with their keys and values; `query_heads` one by one. In a
    mixture of experts whole `experts` may go, or `expert_neurons`, which all experts of a layer
    have in common. Single `weights` become zero. Where `heads`, `query_heads` or `neurons` and
    `weights` share a stage, `sparsity` is of the entries of all matrices that weights are in, and
    how much of it goes as units is tried out."""
    schedule: Schedule | None = None
    """None: in one shot. Otherwise masks close while the following stage trains."""
    criterion: str = Field(default_factory=_default_criterion)
    """A key of `hf_prune.criteria.CRITERIA`. For weights: one of
    `hf_prune.weights.problem.CRITERIA`. If not given, `kfac_obs`, for weights `admm` and with a
    schedule `magnitude`, and `fisher` for the hidden width and with units of experts, whose inputs
    are not those of one projection."""
    solver: str = Field(default_factory=_default_of("knapsack", weights="uniform"))
    """A key of `hf_prune.budget.solvers.SOLVERS`. For weights: `uniform` (the same share of each
    matrix), `global` (one ranking), `outliers`, or `knapsack` (by layer errors). If not given,
    `knapsack`, and for weights `uniform`."""
    template: Template | None = None
    """With `solver: template`: a pattern, its name, or a YAML file with one. It decides alone, or
    within `sparsity` or `target`: what it leaves open then goes uniformly."""
    cost: Literal["parameters", "macs"] = "parameters"
    """What `sparsity` counts. MACs are those of one sequence of `sequence_length` tokens."""
    sparsity: float | None = None
    """Fraction to remove, in [0, 1). Either this or `target`; a pattern such as 2:4, a template, or
    `weights: {threshold_std: ...}` can say it by itself."""
    weights: Weights | None = None
    """More about a stage of single weights."""
    target: Target | None = None
    """What the model may cost afterwards. Either this or `sparsity`."""
    floor: Floor | None = None
    """Remove as much as this allows, and no more than `sparsity` or `target` ask for."""
    of: Literal["prunable", "layers"] = "prunable"
    """The base of `sparsity`: what the stage may remove, or all that the layers hold."""
    min_heads: int = Field(default=1, ge=0)
    """Heads that every attention block keeps. 0: the whole block may go."""
    min_neurons: int = Field(default=1, ge=0)
    """Neurons that every feed-forward block keeps, that of experts too. 0: it may go as a whole."""
    floors: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Units that single sites keep, by shell patterns of their names: `encoder.layer.0.*: 4`. Where
    several say something, the largest number holds."""
    round_to: int = Field(default=1, ge=1)
    """Neurons, and channels, kept are a multiple of this (8 or 16 suits most hardware), unless all
    stay."""
    even: bool = False
    """All layers of a stack keep the same number of heads, and of neurons."""
    ignore: tuple[str, ...] = ()
    """Shell patterns (`encoder.layer.0.*`) of sites or weights that are left alone. They may speak
    of parts that are not prunable, or of another task (`classifier*`); what fits nothing else is an
    error."""
    calibration_samples: int = Field(default=512, ge=1)
    """Examples to use at most."""
    projections: int = Field(default=1, ge=1)
    """Random projections of each example's logits, or draws from what the model predicts, where the
    criterion has them; each costs one backward pass."""
    min_calibration_samples: int = Field(default=8, ge=1)
    """Fewer examples than this are refused: scores would be noise."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens of the sequence whose MACs are counted; no more than a model has positions, if not
    given."""
    reconstruct: bool = True
    """Re-fit the output projections after removal: in one shot, or with a schedule where every
    decision is calibrated. Training does it otherwise."""
    reconstruction: Literal["sequential", "parallel"] = "sequential"
    """What a re-fit sees: what the pruned network really gives, so that it also repairs what
    earlier layers lost; or, all at once, the inputs in the network before this stage."""
    rescale: bool = False
    """Fit one factor for each unit that stays (arXiv:2204.09656), written into its columns, and the
    bias: before `reconstruct`, or instead of it. Held-out examples decide whether it is kept."""
    ridge: float | None = Field(default=None, gt=0)
    """Pull of the re-fit to the old weights, relative to the Gram matrix's mean diagonal. Held-out
    examples choose between a tenth of it, itself and ten times it; single weights take it as it is.
    If not given, 0.01; for models that generate 0.1, where heads and neurons are fitted in sequence
    or single weights to the dense network: less of it fits the calibration text too closely."""
    reconstruction_samples: int | None = Field(default=None, ge=1)
    """Examples for the re-fit of heads and neurons; as many as `calibration_samples`, if not given.
    More help from about 85 % sparsity on."""
    search_trials: int = Field(default=0, ge=0)
    """Networks of other widths that an evolutionary search builds, re-fits and judges before the
    plan is final. Helps where most of the model goes, from about 85 % sparsity on. Of units and
    weights in one stage: splits between them that are tried; if 0, 5."""
    polish_steps: int = Field(default=0, ge=0)
    """Steps of Adam on norms and biases alone, after the re-fit, towards the dense network's output
    distribution. One calibration example in five is held out of all prune stages, and they say
    whether the result is kept. With thousands of examples it pays where most of an encoder went;
    with a few hundred, or little text for a decoder, the examples that judge were worth more."""
    masks: Literal["scored", "movement", "soft_movement", "l0"] = "scored"
    """With a schedule: `scored` by the criterion; or learned: `movement` (the best scores stay) and
    `soft_movement` (scores above a threshold stay; arXiv:2005.07683), or `l0` (hard-concrete gates,
    arXiv:1712.01312, held to the target by a Lagrangian, arXiv:2204.00408)."""
    mask_learning_rate: float = Field(default=0.1, gt=0)
    """Of learned masks and, for `l0`, of the multipliers."""
    coarse: tuple[Literal["layers", "blocks", "hidden"], ...] = ()
    """Of `l0`: further gates (arXiv:2204.00408). Those of `layers` and `blocks` multiply the gates
    of all units of a layer, or of an attention or feed-forward block, so that it can go as a whole;
    they need `min_heads: 0` and `min_neurons: 0`, where these units may go. Those of `hidden` are
    of the channels of the whole model's hidden width."""
    mask_penalty: float = Field(default=1.0, ge=0)
    """Of `soft_movement`: weight of the mean open gate in the loss, reached with the sparsity."""

    @field_validator("sparsity")
    @classmethod
    def _a_fraction(cls, value: float | None) -> float | None:
        return check_fraction(value)

    @model_validator(mode="after")
    def _one_kind(self) -> "Prune":
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError("units must name each kind once, and at least one of them")
        if {"heads", "query_heads"} <= set(self.units):
            raise ValueError("name heads, with their keys and values, or single query_heads")
        if "hidden" in self.units:
            self._check_hidden()
        if self.joint:
            self._check_joint()
        experts = {"experts", "expert_neurons"} & set(self.units)
        if experts and self.schedule:
            raise ValueError("experts and their neurons go in one shot: leave schedule out")
        if len(experts) > 1:
            raise ValueError(
                "experts and expert_neurons share their parameters, so that what both remove does "
                "not add up: write two stages"
            )
        if "weights" in self.units and self.cost == "macs":
            raise ValueError("single weights have no cost in MACs: use cost: parameters")
        if self.even and self.search_trials and not self.joint:
            raise ValueError("search_trials makes layers differ: leave it out, or even")
        if self.of == "layers" and (self.cost == "macs" or "weights" in self.units):
            raise ValueError("of: layers is for cost: parameters of heads and neurons")
        return self

    def _check_hidden(self) -> None:
        if len(self.units) > 1:
            raise ValueError("hidden cannot share a stage with other units: write two stages")
        if self.schedule is not None or self.target is not None or self.floor is not None:
            raise ValueError("the hidden width is pruned in one shot, to a sparsity")
        if self.cost == "macs" or self.of == "layers":
            raise ValueError("the sparsity of the hidden width is one of all parameters it is in")
        if self.rescale or self.reconstruction == "parallel":
            raise ValueError(
                "rescale and reconstruction: parallel are for heads and neurons: what reads and "
                "writes the hidden width is re-fitted in sequence, leave them out"
            )

    def _check_joint(self) -> None:
        if set(self.units) - {"heads", "query_heads", "neurons", "weights"}:
            raise ValueError(
                "weights share a stage with heads, query_heads and neurons only: write two stages, "
                "structure first, then weights"
            )
        if self.schedule is not None:
            raise ValueError(
                "weights share a stage with heads or neurons in one shot: with a schedule write "
                "two stages of the same schedule, structure first, then weights"
            )
        if self.target is not None or self.floor is not None or self.template is not None:
            raise ValueError(
                "heads or neurons and weights in one stage have one sparsity: leave target, floor "
                "and template out, or write two stages"
            )
        if self._implied is not None:
            raise ValueError(
                f"pattern {self.single.pattern} says by itself how much goes, so that no split is "
                "to be found: write two stages, structure first, then weights"
            )

    @model_validator(mode="after")
    def _one_goal(self) -> "Prune":
        single = self.weights
        if single is not None and "weights" not in self.units:
            raise ValueError("weights: is for a stage of single weights, units: [weights]")
        if single is not None and (single.criterion or single.solver) and not self.joint:
            raise ValueError(
                "weights: {criterion, solver} are for weights that share a stage with heads or "
                "neurons: write the criterion and solver of the stage"
            )
        if self.floors and not self.structural:
            raise ValueError("floors are of heads and neurons: leave weights out with ignore")
        implied = self._implied
        if implied is not None and self.sparsity not in (None, implied):
            raise ValueError(
                f"pattern {self.single.pattern} removes {implied:g} of the weights: leave sparsity "
                "out, or write that"
            )
        self._check_threshold()
        goals = (self.sparsity, self.target, self.single.threshold_std)
        given = sum(goal is not None for goal in goals)
        if implied is None and given != 1 and (given or not self._templated):
            raise ValueError("give either sparsity or target, or of weights threshold_std")
        if self.target is not None and not self.structural:
            raise ValueError("target is for heads and neurons: give sparsity to single weights")
        return self

    def _check_threshold(self) -> None:
        if self.single.threshold_std is None:
            return
        if self.joint or self.schedule is not None:
            raise ValueError("threshold_std is for weights alone, in one shot: give a sparsity")
        if self.single.pattern != "unstructured" or self.single.rank == "row":
            raise ValueError(
                "threshold_std looks at each weight of a matrix: leave pattern, rank out"
            )
        if self.solver != "uniform":
            raise ValueError("threshold_std leaves the solver nothing to decide: leave it out")

    @model_validator(mode="after")
    def _gradual(self) -> "Prune":
        gradual = self.schedule
        if self.coarse and self.masks != "l0":
            raise ValueError("coarse gates are for masks: l0")
        least = {"heads": self.min_heads, "neurons": self.min_neurons}
        if {"layers", "blocks"} & set(self.coarse) and any(least.get(unit) for unit in self.units):
            raise ValueError("coarse gates close whole blocks: set min_heads and min_neurons to 0")
        if self.masks != "scored" and (gradual is None or not self.structural):
            raise ValueError("learned masks are for heads and neurons, and need a schedule")
        if gradual and gradual.stop_metric and self.masks == "l0":
            raise ValueError("stop_metric needs masks that are decided step by step, not l0")
        if gradual and not self.structural and (gradual.regrow or gradual.stop_metric):
            raise ValueError("regrow and stop_metric are for heads and neurons")
        if self.floor is not None and (self.schedule is not None or not self.structural):
            raise ValueError("floor is for heads and neurons in one shot")
        return self

    @model_validator(mode="after")
    def _whole_solver(self) -> "Prune":
        if self.solver == "mask_search" and self.schedule is not None:
            raise ValueError("mask_search is for one shot: leave schedule out")
        if (self.solver == "template") != (self.template is not None):
            raise ValueError("solver: template and template: ... belong together: give both")
        if self.template is not None and (self.schedule is not None or not self.structural):
            raise ValueError("a template is for heads and neurons in one shot")
        if self.floor is not None and self.sparsity is None and self.target is None:
            raise ValueError("a floor needs sparsity or target: the most that may go")
        return self

    @model_validator(mode="after")
    def _nothing_unread(self) -> "Prune":
        for reason in unread(self):
            raise ValueError(reason)
        return self

    @property
    def by_admm(self) -> bool:
        """Whether ADMM chooses single weights."""
        name = self.single.criterion or "admm" if self.joint else self.criterion
        return name == "admm"

    @property
    def _templated(self) -> bool:
        """Whether a template says by itself how much goes."""
        template = self.template
        open_ = isinstance(template, UniformWidth) and template.share is None
        return template is not None and not open_

    @property
    def fraction(self) -> float:
        """The sparsity of a stage that is known to have one.

        Raises:
            ConfigError: when it has a target, or a threshold, instead.
        """
        sparsity = self.sparsity if self._implied is None else self._implied
        if sparsity is None and self.target is None and self._templated:
            return 0.0  # no more than what the template takes
        if sparsity is None:
            raise ConfigError(
                "this stage has no sparsity, but a target or a threshold: give a sparsity."
            )
        return sparsity

    @property
    def single(self) -> Weights:
        """How single weights are pruned: what is given, or the defaults."""
        return self.weights or Weights()

    @property
    def _implied(self) -> float | None:
        """The sparsity that an n:m pattern has by itself."""
        kept, colon, of = self.single.pattern.partition(":")
        return 1 - int(kept) / int(of) if colon and int(kept) < int(of) else None

    @property
    def structural(self) -> bool:
        """Whether the stage removes heads or neurons, and not single weights alone."""
        return self.units != ("weights",)

    @property
    def joint(self) -> bool:
        """Whether heads or neurons and single weights share the sparsity of the stage."""
        return self.structural and "weights" in self.units

    def structure_part(self, sparsity: float) -> "Prune":
        """Of a joint stage: its units alone, to a sparsity of their own."""
        units = tuple(unit for unit in self.units if unit != "weights")
        changes = {"units": units, "weights": None, "sparsity": sparsity}
        changes |= {"search_trials": 0, "polish_steps": 0}
        return self.model_copy(update=changes)

    def keeping_dead(self) -> "Prune":
        """The stage, but units that single weights leave dead stay."""
        if "weights" not in self.units:
            return self
        single = self.single.model_copy(update={"remove_dead": False})
        return self.model_copy(update={"weights": single})

    def weights_part(self, sparsity: float) -> "Prune":
        """Of a joint stage: its single weights alone, to a sparsity of their own."""
        single = self.single
        shared = ("ignore", "calibration_samples", "min_calibration_samples", "sequence_length")
        given: dict[str, Any] = {name: getattr(self, name) for name in shared}
        given |= {"reconstruct": self.reconstruct, "ridge": self.ridge, "sparsity": sparsity}
        named = {"criterion": single.criterion, "solver": single.solver}
        given |= {name: value for name, value in named.items() if value is not None}
        alone = single.model_copy(update=dict.fromkeys(named))
        return Prune(units=("weights",), weights=alone, **given)
