"""The multiple-choice knapsack as an integer program, solved by SciPy."""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def least_error(costs, errors, budget):
    """The least error by mixed-integer linear programming; None where nothing fits."""
    flat_costs, flat_errors = np.concatenate(costs), np.concatenate(errors)
    rows = np.zeros((len(costs), len(flat_costs)))
    at = 0
    for index, levels in enumerate(costs):
        rows[index, at : at + len(levels)] = 1
        at += len(levels)
    found = milp(
        flat_errors,
        integrality=np.ones(len(flat_costs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, 1, 1),
            LinearConstraint(flat_costs[None], -np.inf, budget),
        ],
    )
    return found.fun if found.success else None
