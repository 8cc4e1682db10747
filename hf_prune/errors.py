"""What can go wrong, by kind. Each error is also the builtin that a caller would expect."""


class HfPruneError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(HfPruneError, ValueError):
    """A recipe, an option or a name is not valid."""


class PlanError(HfPruneError, ValueError):
    """A plan does not fit the model that it is applied to."""


class UnsupportedModelError(HfPruneError, TypeError):
    """The model is of a family, or wrapped in a way, that is not supported."""


class DataError(HfPruneError, ValueError):
    """Calibration or training data is missing, too short, or out of range."""


class NumericsError(HfPruneError, ArithmeticError):
    """A weight, a statistic or a score is not a finite number."""


class CheckpointError(HfPruneError, ValueError):
    """A saved model is damaged, hostile, or does not describe itself."""


class OutputExistsError(HfPruneError, FileExistsError):
    """The output folder exists and nobody said that it may be replaced."""
